"""What a person looks at after a run: plots, report, model card."""
