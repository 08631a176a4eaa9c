"""--preset: flags for a purpose, from a table by method (presets.toml). Standard library only."""

from collections.abc import Mapping, Sequence

from minisd import reading, registry
from minisd.options import require


def flags(cls: type, kinds: Sequence[str], given: Mapping[str, object]) -> dict[str, object]:
    """The flags of the preset in `given`, which are the flags that have priority; it is that of the first of
    `kinds` that has any. ValueError if there is none, or if all of its flags are given otherwise."""
    table, name = reading.read_toml(registry.HERE / "presets.toml"), given["preset"]
    known = next((table[kind] for kind in kinds if kind in table), {})
    whose = "the small model" if kinds[0] == "tiny" else kinds[0]
    require(name in known, f"--preset {name}: {whose} has {', '.join(known) or 'no presets'}")
    chosen = {flag: value for flag, value in known[name].items() if flag in cls.__dataclass_fields__}
    used = any(given.get(flag, value) == value for flag, value in chosen.items())
    others = ", ".join(f"--{flag} {given.get(flag)}" for flag in chosen)
    require(used, f"--preset {name} has no effect beside {others}")
    return chosen
