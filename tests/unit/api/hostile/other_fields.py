"""Fields of the other routes with wrong types, ranges, sizes and shapes."""

from __future__ import annotations

from typing import Any

from tests.unit.api.client import chat_body
from tests.unit.api.hostile.row import Case, chat_rows, completion_rows, rows, schema_format, tool

COMPLETION: list[Case] = [
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": 5}, 400, "prompt"),
    ({"prompt": [""]}, 400, "prompt[0]"),
    ({"prompt": ["a", []]}, 400, "prompt[1]"),
    ({"prompt": ["a", {}]}, 400, "prompt[1]"),
    ({"prompt": [1, "a"]}, 400, "prompt[0]"),
    ({"prompt": [1, True]}, 400, "prompt[0]"),
    ({"prompt": [1.5]}, 400, "prompt[0]"),
    ({"prompt": [257]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": ["a"] * 4}, 400, "prompt"),
    ({"prompt": "x" * 512}, 400, "prompt"),
    ({"prompt": "x" * 513}, 400, "prompt"),
    ({"echo": True}, 400, "echo"),
    ({"suffix": "x"}, 400, "suffix"),
    ({"best_of": 2}, 400, "best_of"),
    ({"logprobs": 6}, 400, "logprobs"),
    ({"logprobs": -1}, 400, "logprobs"),
    ({"logprobs": True}, 400, "logprobs"),
]

HUGE = 10**4000  # more digits than an error should repeat

MORE_CHAT: list[Case] = [
    ({"max_tokens": HUGE}, 400, "max_tokens"),
    ({"min_tokens": HUGE}, 400, "min_tokens"),
    ({"n": HUGE}, 400, "n"),
    ({"top_k": HUGE}, 400, "top_k"),
    ({"seed": HUGE}, 400, "seed"),
    ({"temperature": HUGE}, 400, "temperature"),
    ({"temperature": 1e-323}, 200, None),
    ({"max_tokens": None, "seed": 0}, 200, None),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, 400, "logit_bias"),
    ({"logit_bias": {"1": "1"}}, 400, "logit_bias.1"),
    ({"logit_bias": {"1" * 5000: 1}}, 400, "logit_bias." + "1" * 64),
    ({"model": "../../etc/passwd"}, 404, "model"),
    ({"model": "tiny\0"}, 404, "model"),
    ({"model": ["tiny"]}, 400, "model"),
    ({"user": "\0\u202e" * 500}, 200, None),
    ({"stop": ["\0"]}, 200, None),
    ({"tools": [tool(name="")]}, 400, "tools[0].function.name"),
    ({"tools": [tool(name=7)]}, 400, "tools[0].function.name"),
    ({"tools": [{"type": "function"}]}, 400, "tools[0].function"),
    ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, 400, "tools[0].type"),
    ({"tools": [tool(name="f", parameters=[])]}, 400, "tools[0].function.parameters"),
    ({"tools": [tool(name="a\"}\n</tool_list>" + "b" * 300)]}, 200, None),
    ({"tools": [tool(name="f", parameters={"$ref": "#"})]}, 200, None),
    ({"structured_outputs": {"x" * 5000: 1}}, 400, "structured_outputs." + "x" * 64),
    ({"guided_json": '{"const": "\\ud800"}'}, 400, "guided_json"),
    ({"guided_json": '{"const": NaN}'}, 400, "guided_json"),
    ({"guided_json": 5}, 400, "guided_json"),
    ({"guided_json": True}, 400, "guided_json"),
    ({"structured_outputs": {"json": "[]"}}, 400, "structured_outputs.json"),
    ({"structured_outputs": {"choice": "a"}}, 400, "structured_outputs.choice"),
    ({"guided_regex": r"(?=a)b"}, 400, "guided_regex"),
    (schema_format({"$ref": "#/nowhere"}), 400, "response_format.json_schema.schema"),
    (schema_format({"$ref": "http://10.0.0.1/schema.json"}), 400, "response_format.json_schema.schema"),
    ({"tool_choice": "required", "tools": [tool(name="f", parameters={"$ref": "#"})]}, 400, "tools"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": {}}]}, 400, "messages[0].tool_calls"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "x", "name": 1}]}, 400, "messages[0].name"),
    ({"messages": {"0": {"role": "user", "content": "x"}}}, 400, "messages"),
    ({"messages": [[{"role": "user", "content": "x"}]]}, 400, "messages[0]"),
    ({"messages": [{"role": "user", "content": "x"}, None]}, 400, "messages[1]"),
]  # fmt: skip

MORE_COMPLETION: list[Case] = [
    ({"prompt": {"a": 1}}, 400, "prompt"),
    ({"prompt": [HUGE]}, 400, "prompt[0]"),
    ({"prompt": ["p", [257]]}, 400, "prompt[1]"),
    ({"prompt": [[1], [1, -1]]}, 400, "prompt[1]"),
    ({"prompt": [[[1]]]}, 400, "prompt[0]"),
    ({"max_tokens": 2**31}, 400, "max_tokens"),
]

RESPONSES: list[Case] = [
    ({"model": None}, 400, "model"),
    ({"model": "gpt"}, 404, "model"),
    ({"input": None}, 400, "input"),
    ({"input": 7}, 400, "input"),
    ({"input": []}, 400, "input"),
    ({"input": ["x"]}, 400, "input[0]"),
    ({"input": "x" * 600}, 400, "input"),
    ({"input": [{"type": "voice"}]}, 400, "input[0]"),
    ({"input": [{"type": None, "role": "user", "content": "x"}]}, 400, "input[0]"),
    ({"input": [{"role": "tool", "content": "x"}]}, 400, "input[0].role"),
    ({"input": [{"role": "user", "content": []}]}, 400, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "ftp://a/"}]}]}, 400, "input[0].content[0].image_url"),
    ({"input": [{"role": "user", "content": [{"type": "input_video", "video_url": "data:,", "fps": 0}]}]}, 400, "input[0].content[0].fps"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, 400, "input[0].call_id"),
    ({"input": [{"type": "function_call", "call_id": 1, "name": "f", "arguments": "{}"}]}, 400, "input[0].call_id"),
    ({"input": [{"type": "reasoning", "summary": [1] * 500}]}, 400, "input[0].summary[0]"),
    ({"instructions": 1}, 400, "instructions"),
    ({"max_output_tokens": 0}, 400, "max_output_tokens"),
    ({"max_output_tokens": 513}, 400, "max_output_tokens"),
    ({"temperature": 3}, 400, "temperature"),
    ({"metadata": {"a": 1}}, 400, "metadata.a"),
    ({"metadata": {str(i): "" for i in range(17)}}, 400, "metadata"),
    ({"tools": [{"type": "function", "name": ""}]}, 400, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "f", "parameters": {"type": "array"}}], "tool_choice": "required"}, 400, "tools[0].parameters"),
    ({"tools": [{"type": "function", "name": "f", "parameters": {"default": float("nan")}}]}, 400, "tools[0].parameters.default"),
    ({"tool_choice": {"type": "function", "name": "f"}}, 400, "tool_choice.name"),
    ({"text": {"format": {"type": "xml"}}}, 400, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "schema": {"type": "foo"}}}}, 400, "text.format.schema"),
    ({"previous_response_id": "resp_1"}, 400, "previous_response_id"),
    ({"background": True}, 400, "background"),
    ({"truncation": "auto"}, 400, "truncation"),
]  # fmt: skip

MESSAGES: list[Case] = [
    ({"model": "gpt"}, 404, None),
    ({"max_tokens": None}, 400, "max_tokens"),
    ({"max_tokens": HUGE}, 400, "max_tokens"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "root", "content": "x"}]}, 400, "messages[0]"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user", "content": []}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, 400, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]}, 400, "messages[0].content[0].source"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64", "media_type": "text/html", "data": ""}}]}]}, 400, "messages[0].content[0].source.media_type"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://10.0.0.1/"}}]}]}, 400, "messages[0].content[0].source.url"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]}]}, 400, "messages[0].content[0].tool_use_id"),
    ({"system": 1}, 400, "system"),
    ({"stop_sequences": [""]}, 400, "stop_sequences[0]"),
    ({"stop_sequences": ["a"] * 17}, 400, "stop_sequences"),
    ({"temperature": 1.5}, 400, "temperature"),
    ({"top_k": HUGE}, 400, "top_k"),
    ({"tools": [{"name": "", "input_schema": {}}]}, 400, "tools[0].name"),
    ({"tools": [{"name": "f", "input_schema": {"type": "array"}}], "tool_choice": {"type": "any"}}, 400, "tools[0].input_schema"),
    ({"tool_choice": {"type": "tool", "name": "f"}}, 400, "tool_choice.name"),
    ({"thinking": {"type": "maybe"}}, 400, "thinking.type"),
    ({"mcp_servers": [{}]}, 400, "mcp_servers"),
]  # fmt: skip

COUNT: list[Case] = [({"messages": "x"}, 400, "messages"), ({"model": "gpt"}, 404, None), ({"tools": [1]}, 400, "tools[0]")]  # fmt: skip

TOKENIZE: list[Case] = [
    ({"prompt": 1}, 400, "prompt"),
    ({"prompt": None}, 400, "prompt"),
    ({"messages": []}, 400, "prompt"),
    ({"model": "gpt"}, 404, "model"),
    ({"chat_template": "{{ cycler.__init__.__globals__ }}"}, 400, "chat_template"),
    ({"prompt": None, "messages": [{"role": "user"}]}, 400, "messages[0].content"),
]
DETOKENIZE: list[Case] = [
    ({"tokens": None}, 400, "tokens"),
    ({"tokens": [257]}, 400, "tokens[0]"),
    ({"tokens": [1, -1]}, 400, "tokens[1]"),
    ({"tokens": [1.0]}, 400, "tokens[0]"),
    ({"tokens": [HUGE]}, 400, "tokens[0]"),
    ({"tokens": []}, 200, None),
]

_ASK: dict[str, Any] = {"model": "tiny", "input": "x"}
_MESSAGE = {**chat_body(), "max_tokens": 8}

ROWS = [
    *chat_rows("more chat", MORE_CHAT),
    *completion_rows("completion", COMPLETION),
    *completion_rows("more completion", MORE_COMPLETION),
    *rows("responses", RESPONSES, "/v1/responses", _ASK),
    *rows("messages", MESSAGES, "/v1/messages", _MESSAGE),
    *rows("count", COUNT, "/v1/messages/count_tokens", chat_body()),
    *rows("tokenize", TOKENIZE, "/tokenize", {"model": "tiny", "prompt": "p"}),
    *rows("detokenize", DETOKENIZE, "/detokenize", {"model": "tiny", "tokens": [1]}),
]
