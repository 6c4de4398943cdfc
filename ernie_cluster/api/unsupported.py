"""OpenAI's and vLLM's fields that would change an answer and are not supported, with the values that ask for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    # OpenAI's
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "suffix": (None, ""),
    # vLLM's
    "add_generation_prompt": (None, True),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "chat_template": (None,),
    "continue_final_message": (None, False),
    "documents": (None, []),
    "guided_grammar": (None,),
    "include_stop_str_in_output": (None, False),
    "mm_processor_kwargs": (None, {}),
    "prompt_logprobs": (None,),
    "skip_special_tokens": (None, True),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
}
"""Of chat and text completions."""
