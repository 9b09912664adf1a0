"""What pruning's verbs of the command line do; imports sit inside the functions, as in graftlm.verbs."""

import argparse
from dataclasses import fields

from graftlm.errors import UserError


def prune(args: argparse.Namespace) -> None:
    from graftlm.configuring import config_from_layers, overrides_node
    from graftlm.pruning.settings import PruneSettings
    from graftlm.yaml_nodes import COMMAND_LINE, empty_mapping, node_of

    if odd := [word for word in args.settings if not word.partition("=")[1]]:
        raise UserError(f"prune: {odd[0]!r}: one MODEL, please; further settings are written KEY=VALUE")
    given = {field.name: getattr(args, field.name, None) for field in fields(PruneSettings)}
    options = node_of({name: value for name, value in given.items() if value is not None}, COMMAND_LINE)
    layers = (options, overrides_node(args.settings))
    # Before torch is imported, so that what is wrong is said at once.
    settings: PruneSettings = config_from_layers(empty_mapping(COMMAND_LINE), *layers, kind=PruneSettings)
    from graftlm.pruning.run import run_prune

    run_prune(args.model, settings, args.data, args.out, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
