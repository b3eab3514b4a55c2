"""Says in words what a type of the configuration schema allows."""

from __future__ import annotations

import msgspec.inspect as mi


def describe(wanted: mi.Type) -> str:
    match wanted:
        case mi.Metadata(type=inner):
            return describe(inner)
        case mi.UnionType(types=types):
            options = [option for option in types if not isinstance(option, mi.NoneType)]
            words = ", or ".join(describe(option) for option in options)
            return words if len(options) == len(types) else f"{words}, or nothing"
        case mi.LiteralType(values=values):
            return ", ".join(str(value) for value in values)
        case mi.IntType():
            return f"a whole number{_range(wanted)}"
        case mi.FloatType():
            return f"a number{_range(wanted)}"
        case mi.BoolType():
            return "true or false"
        case mi.StrType(pattern=str(pattern)):
            return f"text that matches {pattern}"
        case mi.StrType():
            return "text (quote what reads as a number or a date)"
        case mi.StructType(fields=fields):
            return f"a mapping with {', '.join(field.encode_name for field in fields)}"
        case mi.DictType(value_type=value_type):
            return f"a mapping from names to {describe(value_type)}"
        case mi.VarTupleType(min_length=least, max_length=most, item_type=item):
            bounds = f" of {least or 0} to {most}" if most is not None else ""
            return f"a list{bounds} entries, each {describe(item)}"
    raise AssertionError(f"the config schema uses {wanted}, which has no words yet")


def _range(wanted: mi.IntType | mi.FloatType) -> str:
    low = f"from {wanted.ge:g}" if wanted.ge is not None else ""
    low = f"above {wanted.gt:g}" if wanted.gt is not None else low
    high = f"to {wanted.le:g}" if wanted.le is not None else ""
    high = f"below {wanted.lt:g}" if wanted.lt is not None else high
    if low and not high and wanted.ge is not None:
        return f" of {wanted.ge:g} or more"
    return "".join(f" {part}" for part in (low, high) if part)
