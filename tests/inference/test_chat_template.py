"""A chat template is a program out of a model file: it renders as in jinja2, and can neither escape nor run away."""

import resource

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from seawall.inference import Decoder
from seawall.inference.errors import CorruptModelError, InvalidPromptError
from seawall.inference.models.chat import ChatTemplate
from seawall.inference.models.template import compiled
from tests.inference import tiny

CONVERSATION = [
    {"role": "system", "content": "  You are kind.\n"},
    {"role": "user", "content": "What is 2 < 3 & 'x'? é海"},
    {"role": "assistant", "content": "<think>hm</think>\nTrue."},
    {"role": "user", "content": "Thank you."},
]

# In the manner of models that people use.
TEMPLATES = {
    "chatml": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "headers": "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start|>' + message['role'] + '<|end|>\n\n'+ message['content'] | trim + '<|eot|>' %}"
    "{% if loop.index0 == 0 %}{% set content = '<s>' + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start|>assistant<|end|>\n\n' }}",
    "instructions": "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}<s>"
    "{%- for m in rest %}{%- if m['role'] == 'user' %}{%- if loop.last and system is defined %}"
    "{{- '[INST] ' ~ system ~ '\\n\\n' ~ m.content ~ '[/INST]' }}{%- else %}{{- '[INST] ' ~ m.content ~ '[/INST]' }}"
    "{%- endif %}{%- else %}{{- ' ' ~ m.content.split('</think>')[-1].lstrip('\\n') ~ '</s>' }}{%- endif %}"
    "{%- endfor %}",
    "counting": "{% set ns = namespace(users=0, seen=[]) %}{% for m in messages if m.role == 'user' %}"
    "{% set ns.users = ns.users + 1 %}{% set ns.seen = ns.seen + [m.content|length] %}{% endfor %}"
    "{{ ns.users }} {{ ns.seen|join(', ') }} {{ messages|map(attribute='role')|unique|list|join('/') }}"
    "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|map('upper')|join(' ') }}"
    "{{ '%.2f'|string }}{{ (messages|length * 2) ~ messages[-1].content[::-1] }}{{ 'ab' * 3 }}",
    "macros": "{% macro turn(m, n=1) %}{{ n }}:{{ m.content|replace('<', '[')|indent(2) }}\n{% endmacro %}"
    "{% for m in messages %}{{ turn(m, loop.index) }}{% endfor %}{% set block %}{{ messages[0].content }}!{% endset %}"
    "{{ block|trim }}{{ {'a': [1, none, true]}['a'][0] }}{% for a, b in [(1, 2), (3, 4)] %}{{ a }}-{{ b }}{% endfor %}"
    "{{ range(3)|list|length }}{{ 'x' if messages else 'y' }}{{ messages[0]|length }}",
}  # fmt: skip


def plainly(source, messages):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(messages=messages, add_generation_prompt=True)


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:2], CONVERSATION * 20], ids=[4, 1, 80])
def test_templates_render_as_in_jinja2(source, messages):
    render = compiled(source, {})
    expected = plainly(source, messages)
    assert expected
    assert render({"messages": messages, "add_generation_prompt": True}) == expected


MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text()})


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text()}), min_size=1)
)
def test_any_text_renders_as_in_jinja2(messages):
    for source in (TEMPLATES["chatml"], TEMPLATES["counting"]):
        assert compiled(source, {})({"messages": messages, "add_generation_prompt": True}) == plainly(source, messages)


def test_json_is_written_as_transformers_writes_it():
    render = compiled("{{ x|tojson }}{{ x|tojson(indent=2) }}", {})
    assert render({"x": {"a": "<é>"}}) == '{"a": "<é>"}{\n  "a": "<é>"\n}'


class Codec:
    specials: dict = {}  # noqa: RUF012


def refused(source):
    with pytest.raises(InvalidPromptError, match="chat template refuses these messages") as caught:
        ChatTemplate(source, Codec()).render(CONVERSATION)
    return str(caught.value)


DOUBLING = (
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = {} %}{% endfor %}{{ ns.x|length }}"
)
RUNAWAYS = {
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "a long range": "{% for a in range(10**9) %}{% endfor %}",
    "a range of a literal": "{% for a in range(1000000000) %}{% endfor %}",
    "loops over messages": "".join(f"{{% for m{i} in messages %}}" for i in range(16)) + "{% endfor %}" * 16,
    "a macro that calls itself twice": "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(200) }}",
    "a macro that has no end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a product": "{{ ('a' * 1000000000)|length }}",
    "a product of a list": "{{ ([0] * 1000000000)|length }}",
    "products of products": "{{ ('a' * 100000 * 100000)|length }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "adding": DOUBLING.replace("{}", "ns.x + ns.x"),
    "concatenating": DOUBLING.replace("{}", "ns.x ~ ns.x"),
    "joining": DOUBLING.replace("{}", "[ns.x, ns.x]|join"),
    "str.join": DOUBLING.replace("{}", "''.join([ns.x, ns.x])"),
    "str.replace": DOUBLING.replace("{}", "ns.x.replace('a', 'aa')"),
    "replacing": DOUBLING.replace("{}", "ns.x|replace('a', 'aa')"),
    "nesting lists": DOUBLING.replace("{}", "[ns.x, ns.x]"),
    "nesting dicts": DOUBLING.replace("{}", "dict(a=ns.x, b=ns.x)"),
    "nesting literals": DOUBLING.replace("{}", "{'a': ns.x, 'b': ns.x}"),
    "nesting tuples": DOUBLING.replace("{}", "(ns.x, ns.x)"),
    "adding lists": "{% set ns = namespace(x=[0]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "blocks": "{% set x = 'aaaaaaaa' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60 + "{{ x|length }}",
    "one large replacement": "{% set x = 'a' * 99999 %}{{ x.replace('a', x)|length }}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "str.format": "{{ '{:1000000000}'.format(1) }}",
    "str.format by another way": "{{ ('{:1000000000}'|attr('format'))(1) }}",
    "str.center": "{{ 'a'.center(1000000000) }}",
    "str.zfill": "{{ 'a'.zfill(1000000000) }}",
    "str.expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "a deep indentation": "{{ 'a\nb'|indent(1000000000) }}",
    "JSON of a deep indentation": "{{ [1]|tojson(indent=1000000000) }}",
    "writing for ever": "{% set x = 'a' * 9999 %}{% for i in range(9999) %}{{ x }}{% endfor %}",
    "reading for ever": "{% set x = 'a' * 999999 %}{% for i in range(9999) %}{% set y = x.upper() %}{% endfor %}",
    "bytes of a number": "{{ (5).to_bytes(1000000000, 'big')|length }}",
    "bytes of a text": "{{ 'a'.encode().replace(''.encode(), 'b'.encode()) }}",
    "a block of many": "{% set x = 'a' * 999999 %}{% set y %}{% for i in range(900) %}{{ x }}{% endfor %}{% endset %}",
    "dividing large numbers": "{% set ns = namespace(x=9, y=9) %}{% for i in range(21) %}{% set ns.x = ns.x * ns.x %}"
    "{% if i < 20 %}{% set ns.y = ns.x %}{% endif %}{% endfor %}"
    "{% for i in range(9999) %}{{ ns.x // ns.y }}{% endfor %}",
    "nesting items": DOUBLING.replace("{}", "{'a': {'x': ns.x}.items(), 'b': {'x': ns.x}.items()}"),
    "nesting arguments": "{% macro f(n) %}{% if n %}{{ f(n - 1, a=kwargs, b=kwargs) }}{% else %}{{ kwargs }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "searching for ever": "{% set x = 'a' * 999999 %}{% for i in range(9999) %}{{ 'aab' in x }}{% endfor %}",
    "testing for ever": "{% set x = 'a' * 999999 %}{% for i in range(9999) %}{{ x is lower }}{% endfor %}",
    "selecting for ever": "{% set x = 'a' * 999999 %}{{ (['aab'] * 9999)|select('in', x)|list }}",
    "comparing for ever": "{% set x = [1] * 99999 %}{% set y = x + [2] %}{% set z = x + [3] %}"
    "{% for i in range(9999) %}{{ y == z }}{% endfor %}",
    "the largest for ever": "{% set x = [1] * 999999 %}{% for i in range(9999) %}{{ x|max }}{% endfor %}",
    "counting for ever": "{% set x = [1] * 999999 %}{% for i in range(9999) %}{{ x.count(2) }}{% endfor %}",
    "subtracting for ever": "{% set x = dict.fromkeys(range(9999)).keys() %}"
    "{% for i in range(9999) %}{% set y = x - x %}{% endfor %}",
    "cutting for ever": "{% set x = 'a' * 999999 %}{% for i in range(9999) %}{% set y = x[::-1] %}{% endfor %}",
    "sorting for ever": "{% set x = range(9999)|list %}{% for i in range(9999) %}{% set y = x|sort %}{% endfor %}",
}
ESCAPES = [
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''.__class__ }}{{ ''|attr('__class__')|attr('__mro__') }}{{ (''|attr('__class__')).mro() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ self._TemplateReference__context.eval_ctx.environment }}",
    "{{ raise_exception.__globals__['__builtins__'] }}",
    "{{ namespace.__init__.__globals__['sys'].modules }}",
    "{{ joiner.__call__.__func__.__globals__.x }}",
    "{{ ''.join.__self__.__class__.x }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ messages.clear() }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends '/etc/passwd' %}",
    "{{ [].sort(key=messages.clear) }}",
]


@pytest.mark.parametrize("source", RUNAWAYS.values(), ids=RUNAWAYS)
def test_a_template_that_runs_away_is_stopped(source):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(source)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_cannot_reach_out_or_change_what_it_is_given(source):
    messages = [dict(message) for message in CONVERSATION]
    with pytest.raises(InvalidPromptError, match="refuses"):
        ChatTemplate(source, Codec()).render(messages)
    assert messages == CONVERSATION


BROKEN = {
    "a syntax error": ("{% for %}", "Expected"),
    "a filter that is not there": ("{{ 1|center(9) }}", "No filter named 'center'"),
    "a recursive loop": ("{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}", "recursive loop"),
    "too long": ("a" * 70_000, "70,000 characters"),
    "nested too deep": ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "chat template"),
    "blocks nested too deep": ("{% if 1 %}" * 3_000 + "{% endif %}" * 3_000, "chat template"),
}


@pytest.mark.parametrize(("source", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_template_is_a_corrupt_model(source, message):
    with pytest.raises(CorruptModelError, match=message):
        ChatTemplate(source, Codec())


def test_a_template_may_refuse_and_says_why():
    assert "roles must alternate" in refused("{{ raise_exception('roles must alternate') }}")


def test_namespaces_that_hold_each_other_are_not_spelled_out():
    nested = "{% set ns = namespace(a=1) %}" + "{% set ns = namespace(a=ns, b=ns) %}" * 60 + "{{ ns }}"
    assert compiled(nested, {})({}) == "<Namespace>"


def test_two_renderings_do_not_share_their_budget():
    render = compiled("{% for i in range(9000) %}{% for j in range(20) %}{% endfor %}{% endfor %}", {})
    for _ in range(4):
        assert render({}) == ""


def test_a_text_that_utf8_cannot_hold_is_refused(tmp_path):
    with Decoder.load(tiny.write(tmp_path / "a.gguf"), cache_dir=tmp_path, context=32) as decoder:
        for encode in (decoder.encode, decoder.encode_chat):
            with pytest.raises(InvalidPromptError, match="lone surrogates"):
                encode("a\ud800b")
