"""Writing models for other programs: GGUF for llama.cpp."""
