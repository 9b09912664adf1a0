"""Tasks on local files: the stock definition, the stock prompt; the questions chosen; everything that can be wrong."""

import json
import os
from collections import Counter

import lm_eval.tasks
import pytest
from eval_data import SUBJECTS, choice, science, write, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlm.errors import UserError
from graftlm.evaluation import tasks as module
from graftlm.evaluation.local_data import read_local
from graftlm.evaluation.tasks import choose_questions, leaf_tasks, leaves, parse_tasks, prepare_tasks, stock_manager


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    for name in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
        monkeypatch.setattr(name, True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"))


def task_of(name, data):
    (task,) = leaf_tasks(prepare_tasks(parse_tasks([name]), data_dir=data).built[name.partition(":")[0]])
    if task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(1234)
    return task


def requests_of(task):
    """What the model is asked about the first question."""
    task.build_all_requests(limit=1)
    return [instance.args for instance in task.instances]


LETTERS = [" A", " B", " C", " D", " E"]
FIRST = "Question: What is 0 and 0?\nAnswer:"
CHOICES = [" 0", " a", " nothing at all", " some 0s"]
PROMPTS = {
    "arc_easy": [(FIRST, one) for one in CHOICES],
    "arc_challenge": [
        ("Question: What is 20 and 20?\nAnswer:", one) for one in (" 40", " a", " nothing at all", " some 20s")
    ],
    "openbookqa": [("What is 0 and 0?", one) for one in CHOICES],
    "piqa": [("Question: To boil water\nAnswer:", one) for one in (" heat it", " cool it")],
    "social_iqa": [("Q: Jo was tired. Why did Jo go?\nA:", one) for one in (" to eat", " to sleep", " to sing")],
    "winogrande": [(f"Ann thanked Bob as {one}", " had helped.") for one in ("Ann", "Bob")],
    "commonsense_qa": [
        ("Question: Where is it wet?\nA. sea\nB. sun\nC. oven\nD. desk\nE. sand\nAnswer:", one) for one in LETTERS
    ],
    "mmlu_anatomy": [
        (
            "The following are multiple choice questions (with answers) about anatomy.\n\n"
            "anatomy 0\nA. w\nB. x\nC. y\nD. z\nAnswer:",
            one,
        )
        for one in LETTERS[:4]
    ],
    "lambada": [("It was a dark night and the cat saw", ' the\n"night')],
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_is_the_stock_task_s(name, data):
    assert requests_of(task_of(name, data)) == PROMPTS[name]


def test_prompt_of_truthfulqa_has_its_six_examples(data):
    asked = requests_of(task_of("truthfulqa_mc1", data))
    assert [continuation for _, continuation in asked] == [" No.", " Yes.", " At noon."]
    assert asked[0][0].startswith("Q: What is human life expectancy in the United States?\nA: ")
    assert asked[0][0].endswith("were held in Barcelona, Spain.\n\nQ: Is the sky green?\nA:")


def test_shots_come_from_the_files(data):
    ((prompt, _), *_) = requests_of(task_of("mmlu_virology:5", data))
    for i in range(5):
        assert f"shot virology {i}\nA. p\nB. q\nC. r\nD. s\nAnswer: {'ABCDA'[i]}\n\n" in prompt
    assert prompt.endswith("virology 0\nA. w\nB. x\nC. y\nD. z\nAnswer:")
    ((prompt, _), *_) = requests_of(task_of("arc_easy:3", data))
    assert len(prompt.split("\n\n")) == 4
    assert all("What is 5" in shot for shot in prompt.split("\n\n")[:3])
    ((prompt, _),) = requests_of(task_of("gsm8k", data))  # its own definition says 5 shots
    assert prompt.count("Question: One and one?\nAnswer: 1+1=2\n#### 2\n\n") == 5
    assert prompt.endswith("Question: Two and two?\nAnswer:")


def test_tasks_with_examples_of_their_own_need_no_file_of_them(data):
    ((prompt, arguments),) = requests_of(task_of("gsm8k_cot", data))
    assert prompt.count("The answer is") == 8
    assert "Q:" in arguments["until"]
    task = task_of("bbh_cot_fewshot_boolean_expressions", data)
    ((prompt, _),) = requests_of(task)
    assert prompt.count("A: Let's think step by step.") == 4
    assert prompt.endswith("Q: not ( True ) is\nA: Let's think step by step.\n")
    assert task.doc_to_target(task.eval_docs[0]) == "False"


def test_wikitext_is_split_into_articles(data):
    prepared = prepare_tasks(parse_tasks(["wikitext"]), data_dir=data)
    (task,) = leaf_tasks(prepared.built["wikitext"])
    pages = [task.doc_to_target(page) for page in task.eval_docs]
    assert len(pages) == 2
    assert pages[0].startswith(" = One =\n")
    assert "Some words, and <unk>." in pages[0]  # the stock task's detokeniser
    assert "== Part ==" in pages[0]
    assert pages[1].startswith(" = Two =\n")
    assert "<unk>" in prepared.notes["wikitext"][0]


def test_definition_is_the_stock_one_but_for_the_data(data):
    names = ["arc_easy", "winogrande", "social_iqa", "truthfulqa_mc1", "gsm8k_cot", "mmlu_anatomy"]
    prepared = prepare_tasks(parse_tasks(names), data_dir=data)
    _, stock = stock_manager(names)
    for name in names:
        (task,) = leaf_tasks(prepared.built[name])
        mine = task.dump_config()
        for key, value in stock[name].cfg.items():
            if key in ("tag", "metadata") or (isinstance(value, str) and ".doc_to_" in value):
                continue  # YAML !function: a path here, the function's source there
            if key == "fewshot_config":
                assert {part: mine[key][part] for part in value} == value
            else:
                assert mine.get(key) == value or value is None, (name, key)
        assert mine["num_fewshot"] == stock[name].cfg["num_fewshot"] if "num_fewshot" in stock[name].cfg else True


def test_groups_and_lists_of_tasks():
    _, stock = stock_manager(["mmlu", "bbh", "lambada_openai"])
    assert len(leaves(stock, "mmlu")) == 57
    assert len(leaves(stock, "bbh")) == 27
    asked = {one.name: one for one in parse_tasks(["adapt", "lambada"])}
    assert (asked["mmlu"].shots, asked["wikitext"].shots, asked["lambada"].task) == (5, 0, "lambada_openai")
    assert len(parse_tasks(["piqa", "piqa"])) == 1


@pytest.mark.slow
def test_search_in_a_few_folders_finds_what_the_whole_search_finds():
    names = [one.task for name in ("paper-it", "paper-cpt", "adapt") for one in parse_tasks([name])]
    names += ["commonsense_qa", "gsm8k"]
    whole = lm_eval.tasks.TaskManager().task_index
    for name in names:
        _, few = stock_manager([name])
        assert leaves(few, name) == leaves(whole, name)
        assert [few[leaf].yaml_path for leaf in leaves(few, name)] == [
            whole[leaf].yaml_path for leaf in leaves(whole, name)
        ]
        assert len(few) < len(whole) or name == "humaneval"


# --- the choice of questions -----------------------------------------------------------------------------------------


def test_limit_chooses_by_seed_and_name_alone(data):
    def chosen(limit, seed=1234):
        return prepare_tasks(parse_tasks(["arc_easy"]), data_dir=data, limit=limit, seed=seed).chosen

    assert chosen(4) == chosen(4)
    assert chosen(4) != chosen(4, seed=0)
    assert set(chosen(4)["arc_easy"]) < set(chosen(6)["arc_easy"])
    assert chosen(9) == chosen(100) == {}  # all
    assert chosen(4)["arc_easy"] != [0, 1, 2, 3]


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text("abc", min_size=1), st.integers(2, 40), min_size=1, max_size=8), st.integers(2, 60))
def test_limit_is_shared_by_size(sizes, limit):
    chosen = choose_questions(sizes, limit, seed=3)
    if limit >= sum(sizes.values()):
        assert chosen == {}
        return
    least = 1 if len(sizes) == 1 else 2
    shares = {name: len(indices) for name, indices in chosen.items()}
    for name, indices in chosen.items():
        assert indices == sorted(set(indices))
        assert all(0 <= index < sizes[name] for index in indices)
    assert sum(shares.values()) == max(limit, least * len(sizes))
    for giver in sizes:  # no task has so many that another should have had one of them
        for taker in sizes:
            if shares[giver] > least and shares[taker] < sizes[taker]:
                assert sizes[taker] / (shares[taker] + 0.5) <= sizes[giver] / (shares[giver] - 0.5) + 1e-9
    fewer = choose_questions(sizes, limit - 1, seed=3)
    assert all(set(fewer[name]) <= set(chosen[name]) for name in sizes)


def test_questions_are_drawn_evenly():
    drawn = Counter(index for seed in range(400) for index in choose_questions({"x": 10}, 3, seed)["x"])
    assert min(drawn.values()) > 85  # 120 each, give or take 9
    assert max(drawn.values()) < 160


# --- what can be wrong -----------------------------------------------------------------------------------------------


def test_unknown_task(data, monkeypatch):
    few = stock_manager(["arc_easy", "winogrande"])
    monkeypatch.setattr(module, "_read_index", lambda folders: (few[0], dict(few[1])))
    with pytest.raises(UserError, match=r"arc_eassy: no such task .*nearest: arc_easy"):
        prepare_tasks(parse_tasks(["arc_eassy"]), data_dir=data)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["arc_easy:x"], "'x' is no number of shots"),
        (["arc_easy:1", "arc_easy"], "arc_easy: asked for with 1 shots and with its own shots"),
        (["mmlu", "mmlu_anatomy"], "mmlu_anatomy is part of mmlu and of mmlu_anatomy"),
        ([], "none named"),
    ],
)
def test_names_that_contradict(names, words, data):
    with pytest.raises(UserError, match=words):
        prepare_tasks(parse_tasks(names), data_dir=data)


def test_missing_file(tmp_path):
    words = (
        f"commonsense_qa: no data: looked for {tmp_path}/commonsense_qa/test.jsonl, .*/eval/commonsenseqa/test.jsonl"
    )
    with pytest.raises(UserError, match=f"{words}; without --data-dir it is fetched from the Hub"):
        prepare_tasks(parse_tasks(["commonsense_qa"]), data_dir=tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        prepare_tasks(parse_tasks(["commonsense_qa"]), data_dir=tmp_path / "none")


def test_hub_out_of_reach(data):
    with pytest.raises(
        UserError, match=r"^openbookqa: no data from the Hugging Face Hub .*network.*--data-dir DIR with"
    ):
        prepare_tasks(parse_tasks(["openbookqa"]))
    with pytest.raises(
        UserError, match=r"^truthfulqa_mc2: no data from the Hugging Face Hub for truthfulqa/truthful_qa"
    ):
        prepare_tasks(parse_tasks(["truthfulqa_mc2"]), data_dir=data)


def test_all_that_is_missing_is_named_and_what_is_there_is_ready_to_copy(data, tmp_path):
    names = ["sciq:0", "arc_easy:2", "hellaswag:10", "piqa"]
    words = r"^sciq: no data from .*; no data either for hellaswag; the others can be run: --tasks arc_easy:2,piqa"
    with pytest.raises(UserError, match=f"{words}$"):
        prepare_tasks(parse_tasks(names), data_dir=data)
    with pytest.raises(UserError, match=f"{words},humaneval --code-samples 20$"):
        prepare_tasks(parse_tasks(names), data_dir=data, beside="humaneval --code-samples 20")
    with pytest.raises(UserError, match=r"^piqa: no data: .*; no data either for openbookqa$"):
        prepare_tasks(parse_tasks(["piqa", "openbookqa"]), data_dir=tmp_path)


def test_a_hub_out_of_reach_is_tried_once(data, monkeypatch):
    """Each try takes half a minute; a second task is looked for among what was downloaded before."""
    monkeypatch.setattr(module.datasets.config, "HF_HUB_OFFLINE", False)
    offline = []

    def load(manager, one, from_hub):
        offline.append(module.datasets.config.HF_HUB_OFFLINE)
        raise module.MissingData(one.name) from ConnectionError()

    monkeypatch.setattr(module, "_load", load)
    with pytest.raises(UserError):
        prepare_tasks(parse_tasks(["sciq", "hellaswag"]), data_dir=data)
    assert offline == [False, True]
    assert not module.datasets.config.HF_HUB_OFFLINE


def test_too_few_examples(data, tmp_path):
    with pytest.raises(UserError, match=r"arc_challenge: .* 25 examples, 0 found; give .*train.jsonl or .*dev.jsonl"):
        prepare_tasks(parse_tasks(["arc_challenge:25"]), data_dir=data)
    write(tmp_path, "gsm8k/test.jsonl", [{"question": "a", "answer": "#### 1"}])
    with pytest.raises(UserError, match=r"gsm8k: .*give .*gsm8k/train.jsonl"):
        prepare_tasks(parse_tasks(["gsm8k"]), data_dir=tmp_path)


def test_as_many_examples_as_shots_are_enough(tmp_path):
    """One more where the harness might draw the question itself (piqa)."""
    write(tmp_path, "eval/arc_easy/test.jsonl", science(3))  # one folder further down is found too
    write(tmp_path, "eval/arc_easy/dev.jsonl", science(2, start=9))
    ((prompt, _), *_) = requests_of(task_of("arc_easy:2", tmp_path))
    assert prompt.count("Question: ") == 3
    write(tmp_path, "piqa/test.jsonl", [choice("q", "a", "b")])
    for count, enough in ((3, True), (2, False)):
        write(tmp_path, "piqa/train.jsonl", [choice(f"q{i}", "a", "b") for i in range(count)])
        if enough:
            assert requests_of(task_of("piqa:2", tmp_path))[0][0].count("Question: ") == 3
        else:
            with pytest.raises(UserError, match="need 3 examples, 2 found"):
                task_of("piqa:2", tmp_path)


def test_subject_without_rows(tmp_path):
    write(tmp_path, "mmlu/test.jsonl", [choice("a", *"wxyz", subject=subject) for subject in SUBJECTS])
    with pytest.raises(UserError, match="no row with subject 'astronomy'; there are anatomy, virology"):
        prepare_tasks(parse_tasks(["mmlu_astronomy"]), data_dir=tmp_path)


WRONG = {
    "arc_easy": [
        ({"choices": ["a", "b"], "answer": 0}, "question: None is no text"),
        (choice("q", "a"), "no list of two or more"),
        (choice("q", "a", "b", answer=2), r"answer: 2 is no index of choices \(0 to 1\)"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "answer: True is no index"),
    ],
    "piqa": [(choice("q", "a", "b", "c"), "choices: 3 of them; the task's prompt needs 2")],
    "winogrande": [(choice("no blank", "a", "b"), "no blank in 'no blank'")],
    "truthfulqa_mc1": [(choice("q", "a", "b", answer=1), "takes the first choice as the truth")],
    "mmlu_anatomy": [(choice("q", *"abcd"), "subject: None is no text")],
    "gsm8k_cot": [({"question": "q", "answer": "4"}, "does not end with `#### NUMBER`")],
    "lambada": [({"text": "word"}, "a single word")],
    "bbh_cot_fewshot_navigate": [({"input": "a", "task": "navigate"}, "target: None is no text")],
}


@pytest.mark.parametrize(("name", "row", "words"), [(name, *one) for name, several in WRONG.items() for one in several])
def test_row_with_wrong_fields(name, row, words, data, tmp_path):
    folder = {"mmlu_anatomy": "mmlu", "gsm8k_cot": "gsm8k", "bbh_cot_fewshot_navigate": "bbh"}.get(name, name)
    good = (data / folder / "test.jsonl").read_text().splitlines()[0]
    path = tmp_path / folder / "test.jsonl"
    path.parent.mkdir()
    path.write_text(f"{good}\n{json.dumps(row)}\n")
    with pytest.raises(UserError, match=f"test.jsonl:2: .*{words}"):
        prepare_tasks(parse_tasks([name]), data_dir=tmp_path)


def test_social_iqa_without_contexts_says_so(tmp_path):
    write(tmp_path, "social_iqa/dev.jsonl", [choice("q", "a", "b", "c")])
    prepared = prepare_tasks(parse_tasks(["social_iqa"]), data_dir=tmp_path)
    assert prepared.notes["social_iqa"] == ["1 of 1 questions have no context: far harder than the published task"]


def test_earlier_call_leaves_nothing_behind(data, tmp_path):
    prepare_tasks(parse_tasks(["arc_easy:2"]), data_dir=data)
    write(tmp_path, "arc_easy/test.jsonl", science(1, start=7))
    task = task_of("arc_easy", tmp_path)
    assert requests_of(task)[0][0] == "Question: What is 7 and 7?\nAnswer:"


def test_data_that_changes_between_two_evaluations_is_read_anew(tmp_path):
    """And examples count as well as questions where scores are asked whether they are of the same data."""
    folder = write_folder(tmp_path)
    config = {"dataset_path": "cais/mmlu", "dataset_name": "anatomy"}
    before = read_local("mmlu_anatomy", config, folder, 5)
    assert set(before.files) == {"mmlu/test.jsonl", "mmlu/dev.jsonl"}
    file = folder / "mmlu/test.jsonl"
    file.write_text(file.read_text().replace('"w"', '"another"'))
    os.utime(file, (1, 1))
    after = read_local("mmlu_anatomy", config, folder, 5)
    assert after.files["mmlu/test.jsonl"] != before.files["mmlu/test.jsonl"]
    assert after.splits["test"][0] != before.splits["test"][0]
