"""Chat templates that mean harm."""

from __future__ import annotations

LONG = "{% set s = 'a' * 8000000 %}"


def _grow(step: str) -> str:
    """Doubles ``ns.x`` for ever."""
    return (
        "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(x='aa') %}"
        f"{{% for i in range(100) %}}{step}{{% endfor %}}"
    )


def _laugh(step: str, use: str) -> str:
    """Sixty lists that each hold the last one twice."""
    return (
        "{% set ns = namespace(x=['lol'], y=['lol']) %}{% for i in range(60) %}"
        f"{{% set ns.x = {step} %}}{{% endfor %}}{{{{ {use} }}}}"
    )


# name: (source, what the error says)
REFUSED: dict[str, tuple[str, str]] = {
    "string times number": ("{{ 'a' * 10**9 }}", "string of 1000000000 characters"),
    "number times string": ("{{ 10**9 * 'a' }}", "string of 1000000000 characters"),
    "list times number": ("{{ [1] * 10**9 }}", "list of 1000000000 items"),
    "tuple times number": ("{{ (1, 2) * 10**9 }}", "list of 2000000000 items"),
    "power": ("{{ 10**(10**8) }}", "over 4096 bits"),
    "power of powers": ("{{ (10**1000)**1000 }}", "over 4096 bits"),
    "product": (
        "{% set ns = namespace(x=3) %}{% for i in range(100) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "over 4096 bits",
    ),
    "integer of text": ("{{ ('f' * 8000000) | int(base=16) }}", "over 4096 bits"),
    "percent width": ("{{ '%1000000000d' % 1 }}", "pads or indents"),
    "percent width in a filter": ("{{ '%1000000000d' | format(1) }}", "pads or indents"),
    "percent width of arguments": ("{{ '%*d' % (10**9, 1) }}", r"formats with '\*'"),
    "percent precision": ("{{ '%.1000000000f' % 1.0 }}", "pads or indents"),
    "percent width after a key": ("{{ '%(a(b)c)1000000000d' % {'a(b)c': 1} }}", "pads or indents"),
    "percent width after flags": ("{{ '%% %#0- +1000000000d' % 1 }}", "pads or indents"),
    "percent of many": (LONG + "{{ ('%(s)s' * 10000) % {'s': s} }}", "string of"),
    "format width": ("{{ '{:1000000000d}'.format(1) }}", "pads or indents"),
    "format width of arguments": ("{{ '{:{}d}'.format(1, 10**9) }}", "pads or indents"),
    "format of many": (LONG + "{{ ('{0}' * 16000).format(s) }}", "string of 16000000"),
    "format_map": ("{{ '{a}'.format_map({'a': 1}) }}", "unsafe"),
    "center": ("{{ 'a' | center(10**9) }}", "pads or indents"),
    "center as a method": ("{{ 'a'.center(10**9) }}", "pads or indents"),
    "center of a block": ("{% filter center(1000000000) %}a{% endfilter %}", "pads or indents"),
    "ljust": ("{{ 'a'.ljust(1000000000) }}", "pads or indents"),
    "zfill": ("{{ 'a'.zfill(1000000000) }}", "pads or indents"),
    "indent": ("{{ ('a\\n' * 100000) | indent(100000) }}", "pads or indents"),
    "indent by text": ("{{ ('a\\n' * 100000) | indent('a' * 100000) }}", "string of 1000"),
    "tojson indent": ("{{ {'a': 1} | tojson(indent=1000000000) }}", "indent over 16"),
    "tojson of many lines": (
        "{% set ns = namespace(x=range(10000) | list) %}"
        "{% for i in range(60) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson(indent=16) }}",
        "string of",
    ),
    "batch": ("{{ [1] | batch(10**9, 0) | list }}", "'batch' with a number over"),
    "slice": ("{{ [1] | slice(10**9) | list }}", "'slice' with a number over"),
    "round": ("{{ 1.5 | round(10**9, 'ceil') }}", "'round' with a number over"),
    "range": ("{{ range(10**9) | list }}", "Range too big"),
    "growing by ~": (_grow("{% set ns.x = ns.x ~ ns.x %}"), "string of"),
    "growing by +": (_grow("{% set ns.x = ns.x + ns.x %}"), "string of"),
    "growing by a list's +": (
        _grow("{% set ns.x = (ns.x | list if i == 0 else ns.x + ns.x) %}"),
        "list of|items",
    ),
    "growing by join": (_grow("{% set ns.x = [ns.x, ns.x] | join %}"), "string of"),
    "growing by the separator": (_grow("{% set ns.x = ['', '', ''] | join(ns.x) %}"), "string of"),
    "growing by join as a method": (_grow("{% set ns.x = ns.x.join(['', '', '']) %}"), "string of"),
    "growing by replace": (_grow("{% set ns.x = ns.x | replace('a', 'aa') %}"), "string of"),
    "growing by replace as a method": (_grow("{% set ns.x = ns.x.replace('', 'aa') %}"), "string of"),
    "growing by format": (_grow("{% set ns.x = '%s%s' | format(ns.x, ns.x) %}"), "string of"),
    "growing by format as a method": (_grow("{% set ns.x = '{0}{0}'.format(ns.x) %}"), "string of"),
    "growing by %": (_grow("{% set ns.x = '%(x)s%(x)s' % {'x': ns.x} %}"), "string of"),
    "growing by a block": (
        _grow("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
        "string of",
    ),
    "growing by a macro": (_grow("{% set ns.x = twice(ns.x) %}"), "string of"),
    "laughing lists": (_laugh("[ns.x, ns.x]", "ns.x"), "over 131072 items in all"),
    "laughing tuples": (_laugh("(ns.x, ns.x)", "ns.x ~ ''"), "over 131072 items in all"),
    "laughing dicts": (_laugh("{'a': ns.x, 'b': ns.x}", "ns.x | tojson"), "over 131072 items in all"),
    "laughing calls of dict": (_laugh("dict(a=ns.x, b=ns.x)", "ns.x | string"), "over 131072 items in all"),
    "nested lists": (
        "{% set ns = namespace(x=[]) %}{% for i in range(1000) %}{% set ns.x = [ns.x] %}{% endfor %}",
        "more than 64 deep",
    ),
    "a namespace in itself": ("{% set ns = namespace() %}{% set ns.x = ns %}{{ [ns] | tojson }}", "not JSON"),
    "lists of lists added": (
        "{% set a = range(100000) | list %}{{ [a, a, a, a] | map('list') | sum(start=[]) | length }}",
        "over 131072 items in all",
    ),
    "macros for ever": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nested too deeply"),
    "loops for ever": ("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", "nested too deeply"),
    "blocks for ever": ("{% block a %}{{ self.a() }}{% endblock %}", "nested too deeply"),
    "strip": (LONG + "{{ s.strip('b' * 7999999 ~ 'a') }}", "looks for 8000000 characters"),
    "trim": (LONG + "{{ s | trim('b' * 7999999 ~ 'a') }}", "looks for 8000000 characters"),
    "rfind": (LONG + "{{ s.rfind('b' ~ 'a' * 4000000) }}", "looks for 4000001 characters"),
    "rsplit": (LONG + "{{ s.rsplit('b' ~ 'a' * 4000000) }}", "looks for 4000001 characters"),
    "split": ("{{ ('a ' * 4000000).split() }}", "list of 131073 items"),
    "split at": ("{{ ('\u3042 ' * 4000000).split(' ') }}", "list of 131073 items"),
    "splitlines": ("{{ ('\u3042\\n' * 4000000).splitlines() }}", "list of 4000001 items"),
    "list": ("{{ ('\u3042' * 8000000) | list }}", "list of 131073 items"),
    "sort": (LONG + "{{ s | sort }}", "list of 8000000 items"),
    "title": (LONG + "{{ s | title }}", "list of 8000000 items"),
    "join of one string many times": (LONG + "{{ ([s] * 1000) | join }}", "string of 8000"),
    "~ of one string many times": (LONG + "{{ " + "~".join(["s"] * 5000) + " }}", "string of 40000000000"),
    "output of one string many times": (LONG + "{{ s }}" * 3, "output has more than 8388608 characters"),
    "output in a macro": (
        LONG + "{% macro m() %}" + "{{ s }}" * 99 + "{% endmacro %}{{ m() }}",
        "string of 792",
    ),
    "output": ("{% for i in range(9000) %}" + "a" * 1000 + "{% endfor %}", "output has more than 8388608"),
    "memory of slices": (
        LONG + "".join(f"{{% set a{i} = s[1:] %}}" for i in range(50)),
        "over 128 MiB of memory",
    ),
    "memory of strings": (
        LONG + "{% set ns = namespace(l=[]) %}"
        "{% for i in range(100) %}{% set ns.l = ns.l + [(i ~ s)[:100000]] %}{% endfor %}",
        "over 128 MiB of memory",
    ),
    "memory of lists": (
        "{% set ns = namespace(l=none) %}{% for i in range(1000) %}{% set ns.l = [0] * 100000 %}{% endfor %}",
        "over 128 MiB of memory",
    ),
    "memory of a loop's items": (
        "{% set t = '\u3042' * 1000000 %}"
        "{% for c in ('\u3042' * 1000) | map('replace', '\u3042', t) %}{{ loop.length }}{% endfor %}",
        "over 128 MiB of memory",
    ),
    "lipsum": ("{{ lipsum(n=1000000) }}", "'lipsum' is undefined"),
    "time formats": ("{{ strftime_now('%Y' * 100000) }}", "over 256 characters"),
    "include": ("{% include 'a' %}", "no loader"),
    "extends": ("{% extends 'a' %}", "no loader"),
    "import": ("{% import 'os' as os %}", "no loader"),
    "an unknown filter": ("{{ 'a' | urlize }}", "No filter named 'urlize'"),
    "parentheses": ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "nested too deeply"),
    "brackets": ("{{ " + "[" * 20000 + "]" * 20000 + " }}", "nested too deeply"),
    "sums": ("{{ 1" + "+1" * 20000 + " }}", "nested too deeply"),
    "attributes": ("{{ a" + ".a" * 20000 + " }}", "nested too deeply"),
    "loops in loops": ("{% for i in [1] %}" * 300 + "{% endfor %}" * 300, "nested too deeply|too many"),
    "digits": ("{{ " + "9" * 60000 + " }}", "is invalid"),
    "comment without an end": ("{#" * 30000, "Missing end of comment"),
}

# loop for longer than anyone waits
SLOW: dict[str, str] = {
    "loops": "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "loops that pass over all": "{% for i in range(99999) %}"
    + "{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "loops over characters": "{% for i in 'a' * 999999 %}{% for j in 'a' * 999999 %}{% endfor %}{% endfor %}",
    "macros that call themselves twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(60) }}",
    "loops that call themselves twice": "{% for x in [1] recursive %}{% if loop.depth < 60 %}"
    "{{ loop([1]) }}{{ loop([1]) }}{% endif %}{% endfor %}",
    "filters on filters": ("{{ range(99999)" + "|select" * 9 + "|list|length }}") * 99,
    "filters of filters": "{% for i in range(99999) | map('string') %}"
    "{% for j in range(99999) | select('odd') %}{% endfor %}{% endfor %}",
    "cycler": "{% set c = cycler(1, 2) %}{% for i in range(99999) %}{% for j in range(99999) %}"
    "{{ c.next() }}{% endfor %}{% endfor %}",
    "searches": LONG + "{% set t = 'a' * 4000000 ~ 'b' %}{% for i in range(99999) %}{{ t in s }}{% endfor %}",
    "searches in one expression": LONG
    + "{% set t = 'a' * 4000000 ~ 'b' %}{{ ["
    + "t not in s, " * 400
    + "] | length }}",
    "upper case": LONG + "{% for i in range(99999) %}{{ (s | upper | length) }}{% endfor %}",
    "sorting": "{% for i in range(99999) %}{% set x = range(99999) | reverse | sort %}{% endfor %}",
}

# source: output, or None where there is an error
FAIL: dict[str, tuple[str, str | None]] = {
    "class": ("{{ ''.__class__.__mro__ }}", None),
    "class by item": ("{{ ''['__class__']['__mro__'] }}", None),
    "class by filter": ("{{ '' | attr('__class__') | attr('__mro__') }}", ""),
    "class by map": ("{{ [''] | map(attribute='__class__.__mro__') | list }}", None),
    "class by format": ("{{ '{0.__class__.__mro__}'.format('') }}", None),
    "class by format kept for later": ("{% set f = '{0.__class__.__mro__}'.format %}{{ f('') }}", None),
    "class by format of items": (
        "{{ ['{0.__class__.__mro__}'] | map(attribute='format') | map('attr', '__self__') | list }}",
        "[Undefined]",
    ),
    "class by sort": ("{{ ['', ''] | sort(attribute='__class__.__mro__') }}", None),
    "globals of a function": ("{{ raise_exception.__globals__.sys }}", None),
    "closure of a function": ("{{ strftime_now.__closure__[0] }}", None),
    "globals of a class": ("{{ cycler.__init__.__globals__ }}", None),
    "globals of namespace": ("{{ namespace.__init__.__globals__ }}", None),
    "context": ("{{ self._TemplateReference__context.environment }}", None),
    "iterator of a loop": ("{% for i in [1] %}{{ loop._iterator.gi_frame }}{% endfor %}", None),
    "frame of a generator": ("{{ ([1] | map('string')).gi_frame.f_globals }}", None),
    "code of a macro": ("{% macro m() %}{% endmacro %}{{ m._func.__code__ }}", None),
    "environment": ("{{ environment }}", ""),
    "a rewritten call": ("{{ make_list(1) }}{{ tick() }}", None),
    "bytes": ("{{ 'a'.encode() }}", None),
    "to_bytes": ("{{ (1).to_bytes(1000000000, 'big') }}", None),
    "translate": ("{{ 'a'.translate({97: 'b' * 1000}) }}", None),
    "expandtabs": ("{{ '\t'.expandtabs(1000000000) }}", None),
    "fromkeys": ("{{ {}.fromkeys(range(100000)) }}", None),
    "a namespace shows nothing": ("{{ namespace(a=1) }}", "<namespace>"),
}
