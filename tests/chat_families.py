"""Chat templates of our own, in the documented formats of model families, each with its answers worked out by hand.

`full` is the chat "Be brief." / "Why?" / " Because.\\n" / "Sure?" / "Yes." (the first from the system), `bare` is
"Hi" / "Hello." without a system turn. What is trained stands between « and »: it is written by hand, not computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_tui.engine.data import Tokenizer, TokenRow


@dataclass(frozen=True)
class Family:
    """A template, the tokens it needs, and the two chats as they have to come out."""

    template: str
    specials: tuple[str, ...]
    full: str
    bare: str
    bos: str = ""
    eos: str = ""
    stops: tuple[str, ...] = ()


def _prompted(text: str) -> str:
    return "{% if add_generation_prompt %}{{ '" + text + "' }}{% endif %}"


_EACH = "{% for m in messages %}"
_END = "{% endfor %}"
_IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
_INST = ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
_SPLIT_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}"
)

CHATML = Family(
    _EACH + "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}" + _END + _prompted("<|im_start|>assistant\\n"),
    _IM,
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n« Because.\n<|im_end|>»\n"
    "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n«Yes.<|im_end|>»\n",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hello.<|im_end|>»\n",
    eos="<|im_end|>",
)
LLAMA2 = Family(
    _SPLIT_SYSTEM
    + "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles have to alternate') }}"
    "{% endif %}{% if loop.first and sys %}{% set text = '<<SYS>>\\n' + sys + '\\n<</SYS>>\\n\\n' + m.content %}{% else %}"
    "{% set text = m.content %}{% endif %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}" + _END,
    ("<s>", "</s>"),
    "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhy? [/INST]« Because. </s>»<s>[INST] Sure? [/INST]« Yes. </s>»",
    "<s>[INST] Hi [/INST]« Hello. </s>»",
    bos="<s>",
    eos="</s>",
)
LLAMA3 = Family(
    "{{ bos_token }}{% if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}{% endif %}"
    + _SPLIT_SYSTEM
    + "{% set sys = sys | trim %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nKnowledge until: December 2023\\nToday: ' + today + '\\n\\n' + sys + '"
    "<|eot_id|>' }}"
    "{% if tools %}{{ '<|start_header_id|>user<|end_header_id|>\\n\\nTools:' }}{% for t in tools %}{{ '\\n' + t | tojson }}{% endfor %}"
    "{{ '<|eot_id|>' }}{% endif %}{% for m in rest %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}{% set call = m.tool_calls[0].function %}"
    "{{ '<|start_header_id|>assistant"
    '<|end_header_id|>\\n\\n{"name": "\' + call.name + \'", "parameters": \' + call.arguments | tojson + \'}<|eom_id|>\' }}'
    "{% elif m.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content | tojson + '<|eot_id|>' }}"
    "{% else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endif %}"
    + _END
    + _prompted("<|start_header_id|>assistant<|end_header_id|>\\n\\n"),
    _LLAMA,
    "<|begin_of_text|><|start_header_id|>system"
    "<|end_header_id|>\n\nKnowledge until: December 2023\nToday: 26 Jul 2024\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«Because.<|eot_id|>»"
    "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«Yes.<|eot_id|>»",
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nKnowledge until: December 2023\nToday: 26 Jul 2024\n\n<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«Hello.<|eot_id|>»",
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
)
MISTRAL_V1 = Family(
    _SPLIT_SYSTEM
    + "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}{{ '[INST] ' + (sys + '\\n\\n' if sys and loop.first else '')"
    " + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + eos_token }}{% endif %}" + _END,
    ("<s>", "</s>"),
    "<s>[INST] Be brief.\n\nWhy? [/INST]« Because.</s>»[INST] Sure? [/INST]« Yes.</s>»",
    "<s>[INST] Hi [/INST]« Hello.</s>»",
    bos="<s>",
    eos="</s>",
)
MISTRAL_V3 = Family(  # the system goes before the last question, and calls need ids of nine letters
    _SPLIT_SYSTEM + "{{ bos_token }}{% set ns = namespace(calling=false) %}{% for m in rest %}"
    "{% if m.role == 'tool' and not ns.calling %}{{ raise_exception('a result without a call') }}{% endif %}"
    "{% set last = rest | selectattr('role', 'equalto', 'user') | list | last %}"
    "{% if m.role == 'user' %}{% if tools and m == last %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + (sys + '\\n\\n' if sys and m == last else '') + m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}{% set ns.calling = true %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{{ (', ' if not loop.first else '')"
    ' + \'{"name": "\' + c.function.name + \'", "arguments": \' + c.function.arguments | tojson + \', "id": "\' + c.id + \'"}\' }}'
    "{% endfor %}{{ ']' + eos_token }}{% elif m.role == 'tool' %}"
    "{{ '[TOOL_RESULTS] {\"content\": ' + m.content + ', \"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}" + _END,
    _INST,
    "<s>[INST] Why?[/INST]« Because.</s>»[INST] Be brief.\n\nSure?[/INST]« Yes.</s>»",
    "<s>[INST] Hi[/INST]« Hello.</s>»",
    bos="<s>",
    eos="</s>",
)
MISTRAL_V7 = Family(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ '[SYSTEM_PROMPT] ' + m.content + '[/SYSTEM_PROMPT]' }}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}" + _END,
    _INST,
    "<s>[SYSTEM_PROMPT] Be brief.[/SYSTEM_PROMPT][INST] Why?[/INST]«  Because.\n</s>»[INST] Sure?[/INST]« Yes.</s>»",
    "<s>[INST] Hi[/INST]« Hello.</s>»",
    bos="<s>",
    eos="</s>",
)
MISTRAL_TEKKEN = Family(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
    "{% elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}" + _END,
    _INST,
    "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Why?[/INST]« Because.\n</s>»[INST]Sure?[/INST]«Yes.</s>»",
    "<s>[INST]Hi[/INST]«Hello.</s>»",
    bos="<s>",
    eos="</s>",
)
_GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_GEMMA_TURN = (
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end_of_turn>\\n' }}"
    + _END
    + _prompted("<start_of_turn>model\\n")
)
_GEMMA_FULL = (
    "<bos><start_of_turn>user\nBe brief.\n\nWhy?<end_of_turn>\n<start_of_turn>model\n«Because.<end_of_turn>»\n"
    "<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n«Yes.<end_of_turn>»\n"
)
_GEMMA_BARE = "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n«Hello.<end_of_turn>»\n"
GEMMA2 = Family(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + _GEMMA_TURN,
    _GEMMA,
    _GEMMA_FULL,
    _GEMMA_BARE,
    bos="<bos>",
    eos="<eos>",
    stops=("<end_of_turn>",),
)
GEMMA3 = Family(
    _SPLIT_SYSTEM + "{{ bos_token }}{% for m in rest %}{% if loop.first and sys %}"
    "{{ '<start_of_turn>user\\n' + sys + '\\n\\n' + m.content | trim + '<end_of_turn>\\n' }}{% else %}"
    + _GEMMA_TURN.replace("{% endfor %}", "{% endif %}{% endfor %}"),
    _GEMMA,
    _GEMMA_FULL,
    _GEMMA_BARE,
    bos="<bos>",
    eos="<eos>",
)
PHI3 = Family(  # the whole chat is closed by one more token
    _EACH
    + "{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}"
    + _END
    + "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
    ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "<|system|>\nBe brief.<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n« Because.\n<|end|>»\n"
    "<|user|>\nSure?<|end|>\n<|assistant|>\n«Yes.<|end|>»\n<|endoftext|>",
    "<|user|>\nHi<|end|>\n<|assistant|>\n«Hello.<|end|>»\n<|endoftext|>",
    eos="<|endoftext|>",
)
PHI4 = Family(
    _EACH + "{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}" + _END + _prompted("<|im_start|>assistant<|im_sep|>"),
    (*_IM, "<|im_sep|>"),
    "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Why?<|im_end|><|im_start|>assistant<|im_sep|>"
    "« Because.\n<|im_end|>»"
    "<|im_start|>user<|im_sep|>Sure?<|im_end|><|im_start|>assistant<|im_sep|>«Yes.<|im_end|>»",
    "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>«Hello.<|im_end|>»",
    eos="<|im_end|>",
)
_TOOLS_IN_SYSTEM = (
    "{% if tools %}{{ '<|im_start|>system\\n' + (sys if sys else 'You help.') + '\\n\\nTools:' }}{% for t in tools %}"
    "{{ '\\n' + t | tojson }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% else %}"
)
_TOOL_RESULTS = (
    "{% if loop.first or rest[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}{{ '\\n<tool_response>\\n' + m.content"
    " + '\\n</tool_response>' }}{% if loop.last or rest[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
)
_CALLS = (
    '{% for c in m.tool_calls %}{{ \'\\n<tool_call>\\n{"name": "\' + c.function.name + \'", "arguments": \' + c.function.arguments | tojson'
    " + '}\\n</tool_call>' }}{% endfor %}"
)
QWEN25 = Family(
    _SPLIT_SYSTEM + _TOOLS_IN_SYSTEM + "{{ '<|im_start|>system\\n' + (sys if sys else 'You help.') + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in rest %}{% if m.role == 'tool' %}" + _TOOL_RESULTS + "{% elif m.tool_calls %}{{ '<|im_start|>assistant' }}"
    "{% if m.content %}{{ '\\n' + m.content }}{% endif %}" + _CALLS + "{{ '<|im_end|>\\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}" + _END + _prompted("<|im_start|>assistant\\n"),
    _IM,
    CHATML.full,
    "<|im_start|>system\nYou help.<|im_end|>\n" + CHATML.bare,
    eos="<|im_end|>",
)
QWEN3 = Family(  # thoughts are kept after the last question only; an answer without one gets an empty one there
    _SPLIT_SYSTEM + _TOOLS_IN_SYSTEM + "{% if sys %}{{ '<|im_start|>system\\n' + sys + '<|im_end|>\\n' }}{% endif %}{% endif %}"
    "{% set ns = namespace(asked=0) %}{% for m in rest %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in rest %}{% if m.role == 'tool' %}"
    + _TOOL_RESULTS
    + "{% elif m.role == 'assistant' %}{% set text = m.content %}{% set thought = '' %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}{% elif '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1] %}{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\\n' }}{% if loop.index0 > ns.asked and (loop.last or thought) %}{{ '<think>\\n' + thought.strip('\\n')"
    " + '\\n</think>\\n\\n' }}{% endif %}{{ text }}{% if m.tool_calls %}" + _CALLS + "{% endif %}{{ '<|im_end|>\\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}" + _END + _prompted("<|im_start|>assistant\\n"),
    _IM,
    CHATML.full.replace("«Yes.", "<think>\n\n</think>\n\n«Yes."),
    CHATML.bare.replace("«Hello.", "<think>\n\n</think>\n\n«Hello."),
    eos="<|im_end|>",
)
GRANITE = Family(
    "{% if messages[0].role != 'system' %}{{ '<|start_of_role|>system<|end_of_role|>Today is ' + strftime_now('%B %d, %Y') + '."
    "<|end_of_text|>\\n' }}{% endif %}"
    + _EACH
    + "{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\\n' }}"
    + _END
    + _prompted("<|start_of_role|>assistant<|end_of_role|>"),
    ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    "<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>Why?<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>« Because.\n<|end_of_text|>»\n<|start_of_role|>user<|end_of_role|>Sure?<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>«Yes.<|end_of_text|>»\n",
    "<|start_of_role|>system<|end_of_role|>Today is July 26, 2024.<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>«Hello.<|end_of_text|>»\n",
    bos="<|end_of_text|>",
    eos="<|end_of_text|>",
)
COMMAND_R = Family(
    "{{ bos_token }}" + _EACH + "{{ '<|START_OF_TURN_TOKEN|>' + {'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>',"
    " 'assistant': '<|CHATBOT_TOKEN|>'}[m.role] + m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}"
    + _END
    + _prompted("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"),
    ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Why?"
    "<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>«Because.<|END_OF_TURN_TOKEN|>»<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Sure?<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>«Yes.<|END_OF_TURN_TOKEN|>»",
    "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>«Hello."
    "<|END_OF_TURN_TOKEN|>»",
    bos="<BOS_TOKEN>",
    eos="<|END_OF_TURN_TOKEN|>",
)
ZEPHYR = Family(  # roles are plain text; the model itself begins its line
    _EACH + "{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}" + _END + _prompted("<|assistant|>"),
    ("<s>", "</s>"),
    "<|system|>\nBe brief.</s>\n<|user|>\nWhy?</s>\n<|assistant|>«\n Because.\n</s>»\n<|user|>\nSure?</s>\n<|assistant|>«\nYes.</s>»\n",
    "<|user|>\nHi</s>\n<|assistant|>«\nHello.</s>»\n",
    bos="<s>",
    eos="</s>",
)
VICUNA = Family(
    _SPLIT_SYSTEM + "{{ bos_token + (sys if sys else 'A polite chat.') + ' ' }}{% for m in rest %}{% if m.role == 'user' %}"
    "{{ 'USER: ' + m.content | trim + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content | trim + eos_token }}{% endif %}"
    + _END
    + _prompted("ASSISTANT:"),
    ("<s>", "</s>"),
    "<s>Be brief. USER: Why? ASSISTANT:« Because.</s>»USER: Sure? ASSISTANT:« Yes.</s>»",
    "<s>A polite chat. USER: Hi ASSISTANT:« Hello.</s>»",
    bos="<s>",
    eos="</s>",
)
ALPACA = Family(  # no end token of its own after the last answer
    _SPLIT_SYSTEM
    + "{{ sys if sys else 'Below is a task.' }}{% for m in rest %}{% if m.role == 'user' %}{{ '\\n\\n### Instruction:\\n' + m.content }}"
    "{% else %}{{ '\\n\\n### Response:\\n' + m.content }}{% if not loop.last %}{{ eos_token }}{% endif %}{% endif %}"
    + _END
    + _prompted("\\n\\n### Response:\\n"),
    ("<s>", "</s>"),
    "Be brief.\n\n### Instruction:\nWhy?\n\n### Response:\n« Because.\n</s>»\n\n### Instruction:\nSure?\n\n### Response:\n«Yes.</s>»",
    "Below is a task.\n\n### Instruction:\nHi\n\n### Response:\n«Hello.</s>»",
    bos="<s>",
    eos="</s>",
)
_DEEP = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
DEEPSEEK = Family(  # drops every thought, and has the model begin with one
    _SPLIT_SYSTEM + "{{ bos_token + sys }}{% for m in rest %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% else %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}" + _END + _prompted("<｜Assistant｜><think>\\n"),
    _DEEP,
    "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Why?<｜Assistant｜>« Because.\n<｜end▁of▁sentence｜>»<｜User｜>Sure?"
    "<｜Assistant｜>«Yes.<｜end▁of▁sentence｜>»",
    "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>«Hello.<｜end▁of▁sentence｜>»",
    bos=_DEEP[0],
    eos=_DEEP[1],
)
OLMO = Family(  # the first token is the end token as well; the last answer has no line end
    "{{ bos_token }}" + _EACH + "{{ '<|' + m.role + '|>\\n' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or m.role != 'assistant' %}{{ '\\n' }}{% endif %}" + _END + _prompted("<|assistant|>\\n"),
    ("<|endoftext|>",),
    "<|endoftext|><|system|>\nBe brief.\n<|user|>\nWhy?\n<|assistant|>\n« Because.\n<|endoftext|>»\n<|user|>\nSure?\n"
    "<|assistant|>\n«Yes.<|endoftext|>»",
    "<|endoftext|><|user|>\nHi\n<|assistant|>\n«Hello.<|endoftext|>»",
    bos="<|endoftext|>",
    eos="<|endoftext|>",
)
SMOLLM3 = Family(
    _SPLIT_SYSTEM
    + "{{ '<|im_start|>system\\n## Metadata\\n\\nToday: ' + strftime_now('%d %B %Y') + '\\nReasoning: off\\n\\n## Instructions\\n\\n'"
    " + (sys if sys else 'You help.') + '\\n\\n<|im_end|>\\n' }}{% for m in rest %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{{ '<think>\\n\\n</think>\\n' + m.content.lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\\n' }}" + _END + _prompted("<|im_start|>assistant\\n<think>\\n\\n</think>\\n"),
    _IM,
    "<|im_start|>system\n## Metadata\n\nToday: 26 July 2024\nReasoning: off\n\n## Instructions\n\nBe brief.\n\n<|im_end|>\n"
    "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n« Because.\n<|im_end|>»\n"
    "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n«Yes.<|im_end|>»\n",
    "<|im_start|>system\n## Metadata\n\nToday: 26 July 2024\nReasoning: off\n\n## Instructions\n\nYou help.\n\n<|im_end|>\n"
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n«Hello.<|im_end|>»\n",
    eos="<|im_end|>",
)
GLM = Family(  # an answer ends with the token that opens the next question
    "{{ '[gMASK]<sop>' }}" + _EACH + "{{ '<|' + m.role + '|>\\n' + m.content }}" + _END + _prompted("<|assistant|>\\n"),
    ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
    "[gMASK]<sop><|system|>\nBe brief.<|user|>\nWhy?<|assistant|>\n« Because.\n<|user|>»\nSure?<|assistant|>\n«Yes.<|endoftext|>»",
    "[gMASK]<sop><|user|>\nHi<|assistant|>\n«Hello.<|endoftext|>»",
    eos="<|endoftext|>",
    stops=("<|endoftext|>", "<|user|>"),
)
HARMONY = Family(  # thoughts on a channel of their own; the last answer is closed by another token
    _EACH + "{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}" + _END + _prompted("<|start|>assistant"),
    ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
    "<|start|>system<|message|>Be brief.<|end|><|start|>user<|message|>Why?<|end|><|start|>assistant<|channel|>final<|message|>"
    "« Because.\n<|end|>»"
    "<|start|>user<|message|>Sure?<|end|><|start|>assistant<|channel|>final<|message|>«Yes.<|return|>»",
    "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>«Hello.<|return|>»",
    eos="<|return|>",
)
OPENCHAT = Family(
    "{{ bos_token }}"
    + _EACH
    + "{{ ('User' if m.role == 'user' else m.role | capitalize) + ': ' + m.content + '<|end_of_turn|>' }}"
    + _END
    + _prompted("Assistant:"),
    ("<s>", "<|end_of_turn|>"),
    "<s>System: Be brief.<|end_of_turn|>User: Why?<|end_of_turn|>Assistant:«  Because.\n<|end_of_turn|>»User: Sure?<|end_of_turn|>"
    "Assistant:« Yes.<|end_of_turn|>»",
    "<s>User: Hi<|end_of_turn|>Assistant:« Hello.<|end_of_turn|>»",
    bos="<s>",
    eos="<|end_of_turn|>",
)
LATE = Family(  # the end token comes with the next message, and no file names it as a stop
    _EACH + "{% if not loop.first %}{{ '<|sep|>' }}{% endif %}{{ m.role + '=' + m.content }}" + _END + _prompted("<|sep|>assistant="),
    ("<|sep|>", "</s>"),
    "system=Be brief.<|sep|>user=Why?<|sep|>assistant=« Because.\n<|sep|>»user=Sure?<|sep|>assistant=«Yes.<|sep|>»",
    "user=Hi<|sep|>assistant=«Hello.<|sep|>»",
    eos="</s>",
)
FAMILIES = {name.lower(): family for name, family in list(globals().items()) if isinstance(family, Family)}


def trained_texts(tokens: TokenRow, tokenizer: Tokenizer) -> list[str]:
    """Return each run of trained tokens as text."""
    runs: list[list[int]] = []
    for place, index in enumerate(tokens.input_ids):
        if tokens.trained[place]:
            if not tokens.trained[place - 1]:
                runs.append([])
            runs[-1].append(index)
    return [tokenizer.decode(ids) for ids in runs]
