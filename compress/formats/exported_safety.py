"""What the description of an exported program may say: nothing that torch would execute.

`torch.export.load` trusts its file. It evaluates the strings of symbolic sizes with sympy,
executes guards as Python, looks operators up by attribute path, imports enums and factories that
a tree specification names, and writes node names into generated source. So the description is
rewritten before torch sees it: what is needed is checked against a grammar, the rest is dropped.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
from typing import Any

from compress.errors import LoadError, UnsafeFileError

Json = Any
"""A value that `json.loads` gives."""

_ATEN = r"torch\.ops\.(?:aten|prims|quantized_decomposed|torchvision)\.(\w+)(?:\.(\w+))?"
_HIGHER_ORDER = (
    r"torch\.ops\.higher_order\."
    r"(?:cond|wrap_with_set_grad_enabled|wrap_with_autocast|scan|map_impl|while_loop)"
)
_PYTHON = (
    r"_operator\.(?:getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|"
    r"and_|or_|not_|abs)"
    r"|torch\.sym_(?:int|float|max|min|not|ite|sum|sqrt)"
    r"|math\.(?:ceil|floor|trunc|sqrt|log2)"
)
_UNSAFE_OPERATORS = {"from_file", "save", "set_data", "record_stream", "_print"}
_DUNDER_OPERATORS = {"__and__", "__or__", "__xor__", "__lshift__", "__rshift__"}

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_PATH = re.compile(r"[\w.@:/+\-<>=]*", re.ASCII)
_MODULE_STACK = re.compile(r"[\w.@:/+\-,;<>()\[\]' ]*", re.ASCII)
_RANGE = re.compile(r"[a-z0-9*+\-/(), ]*")
_IDENTIFIER_KEYS = {"name", "as_name", "forward_arg_names"}

_SYMPY_CALLS = {
    *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs"),
    *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Equality", "Unequality"),
    *("StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "floor", "ceiling"),
    *("FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "CeilDiv"),
    *("FloorToInt", "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv"),
    *("IntTrueDiv", "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat"),
    *("Identity", "IsNonOverlappingAndDenseIndicator"),
}
_SYMBOL = re.compile(r"[a-z]{1,4}\d{1,9}")
_LONGEST_EXPRESSION = 4000
_LARGEST_EXPONENT = 8
_MOST_POWERS = 4
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.BitAnd, ast.BitOr)
_PLAIN_NODES = (ast.Expression, ast.Load, ast.Compare, ast.cmpop, ast.UnaryOp, ast.unaryop)

_TREE_TYPES = {
    None,
    "builtins.tuple",
    "builtins.list",
    "builtins.dict",
    "collections.OrderedDict",
    "torch.fx.immutable_collections.immutable_list",
    "torch.fx.immutable_collections.immutable_dict",
}


def clean_program(text: bytes, name: str) -> bytes:
    """The JSON description of an exported program, rewritten so that loading it runs no code.

    Raises:
        UnsafeFileError: it says something that torch would execute.
        LoadError: it is not the description of an exported program.
    """
    program = _parse(text, name)
    cleaned = _clean(program, "", name)
    cleaned["guards_code"] = []
    module = cleaned.get("graph_module")
    if isinstance(module, dict):
        module["metadata"], module["treespec_namedtuple_fields"] = {}, {}
    return json.dumps(cleaned).encode()


def clean_payloads(text: bytes, name: str, prefix: str) -> tuple[bytes, tuple[str, ...]]:
    """The table of weights or constants, and the names of the entries that hold their bytes.

    Raises:
        UnsafeFileError: a payload is a pickle or a custom object.
        LoadError: it is not such a table.
    """
    table = _clean(_parse(text, name), "", name)
    payloads = table.get("config")
    if not isinstance(payloads, dict):
        raise _malformed(name)
    entries = []
    for key, payload in payloads.items():
        entry = payload.get("path_name") if isinstance(payload, dict) else None
        if not isinstance(entry, str) or not isinstance(payload, dict):
            raise _malformed(name)
        if payload.get("use_pickle") is not False or not re.fullmatch(rf"{prefix}\d+", entry):
            raise UnsafeFileError(
                f"{name} is refused: it stores {key!r} as a pickled object ({entry}) and not as "
                "a plain tensor."
            )
        entries.append(entry)
    return json.dumps(table).encode(), tuple(dict.fromkeys(entries))


def _parse(text: bytes, name: str) -> dict[str, Json]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _malformed(name) from error
    if not isinstance(value, dict):
        raise _malformed(name)
    return value


def _malformed(name: str) -> LoadError:
    return LoadError(
        f"{name} is a torch.export archive whose description cannot be read: it is damaged or "
        "of another version. Save it again with torch.export.save."
    )


def _refuse(name: str, what: str, text: object) -> UnsafeFileError:
    shown = str(text) if len(str(text)) < 80 else str(text)[:77] + "..."
    return UnsafeFileError(
        f"{name} is refused: {what} {shown!r} is none that an exported network needs, and "
        "loading it could execute code."
    )


def _clean(value: Json, key: str, name: str) -> Json:
    if isinstance(value, str):
        return _clean_text(value, key, name)
    if isinstance(value, list):
        if key == "as_strings" and all(isinstance(item, str) for item in value):
            return value
        return [] if key == "guards_code" else [_clean(item, key, name) for item in value]
    if not isinstance(value, dict):
        return value
    if key in ("device", "as_device") and set(value) <= {"type", "index"}:
        return {"type": "cpu", "index": None}
    if key == "metadata" and all(isinstance(item, str) for item in value.values()):
        stack = value.get("nn_module_stack", "")
        return {"nn_module_stack": stack} if stack and _MODULE_STACK.fullmatch(stack) else {}
    if {"class_fqn", "custom_obj_name"} & set(value):
        raise _refuse(name, "the custom object", value)
    for entry in value:
        # The key of a range may be an expression, which torch only compares.
        if key != "range_constraints" or not _RANGE.fullmatch(entry):
            _check_path(entry, name)
    return {entry: _clean(item, entry, name) for entry, item in value.items()}


def _clean_text(text: str, key: str, name: str) -> str:
    if key == "as_string" or (key == "torch_version" and text.isprintable()):
        return text
    if key in ("target", "as_operator"):
        _check_operator(text, name)
    elif key == "expr_str":
        _check_expression(text, name)
    elif key in ("in_spec", "out_spec"):
        _check_tree(text, name)
    elif key in _IDENTIFIER_KEYS:
        if text and (not _IDENTIFIER.fullmatch(text) or text.startswith("__")):
            raise _refuse(name, "the name", text)
    else:
        _check_path(text, name)
    return text


def _check_path(text: str, name: str) -> None:
    hidden = any(part.startswith("__") and part.endswith("__") for part in text.split("."))
    if hidden or not _PATH.fullmatch(text):
        raise _refuse(name, "the name", text)


def _check_operator(text: str, name: str) -> None:
    match = re.fullmatch(_ATEN, text, re.ASCII)
    if match is not None:
        operator, overload = match.group(1), match.group(2) or ""
        hidden = operator.startswith("__") and operator not in _DUNDER_OPERATORS
        if not hidden and operator not in _UNSAFE_OPERATORS and not overload.startswith("__"):
            return
    elif re.fullmatch(f"{_HIGHER_ORDER}|{_PYTHON}", text):
        return
    raise _refuse(name, "the operator", text)


def _check_expression(text: str, name: str) -> None:
    """Refuse everything but arithmetic over symbols: sympy evaluates this string as Python."""
    try:
        if len(text) > _LONGEST_EXPRESSION:
            raise _refuse(name, "the size", text)
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _refuse(name, "the size", text) from error
    names_called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    powers = sum(isinstance(node, ast.Pow) for node in nodes) + text.count("Pow")
    arithmetic = all(_is_arithmetic(node, id(node) in names_called) for node in nodes)
    if not arithmetic or powers > _MOST_POWERS:
        raise _refuse(name, "the size", text)


def _is_arithmetic(node: ast.AST, called: bool) -> bool:
    if isinstance(node, ast.Call):
        flags = all(word.arg and isinstance(word.value, ast.Constant) for word in node.keywords)
        if not flags or not isinstance(node.func, ast.Name):
            return False
        powers = node.func.id in ("Pow", "PowByNatural", "FloatPow", "LShift")
        return not powers or (len(node.args) == 2 and _small(node.args[1]))
    if isinstance(node, ast.Name):
        return node.id in _SYMPY_CALLS if called else bool(_SYMBOL.fullmatch(node.id))
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return bool(re.fullmatch(rf"{_SYMBOL.pattern}|-?[0-9.e+\-]{{1,40}}", node.value))
        return isinstance(node.value, int | float) and abs(node.value) < 2**64
    if isinstance(node, ast.BinOp):
        power = isinstance(node.op, ast.Pow) and _small(node.right)
        return power or isinstance(node.op, _OPERATORS)
    return isinstance(node, (*_PLAIN_NODES, *_OPERATORS, ast.Pow, ast.keyword))


def _small(exponent: ast.expr) -> bool:
    """Whether it is a number that cannot blow an expression up."""
    if isinstance(exponent, ast.Call) and len(exponent.args) == 1:
        exponent = exponent.args[0]
    if isinstance(exponent, ast.UnaryOp):
        exponent = exponent.operand
    if not isinstance(exponent, ast.Constant) or not isinstance(exponent.value, int):
        return False
    return abs(exponent.value) <= _LARGEST_EXPONENT


def _check_tree(text: str, name: str) -> None:
    try:
        protocol, root = json.loads(text)
        pending = [root]
        while pending:
            node = pending.pop()
            if node["type"] not in _TREE_TYPES:
                raise LoadError(
                    f"{name} takes or returns Python objects of type {node['type']!r}; export a "
                    "model that takes and returns tensors, tuples, lists or dicts."
                )
            context = node["context"]
            keys = json.loads(context) if isinstance(context, str) else context
            if not _is_tree_context(keys) or protocol != 1:
                raise _refuse(name, "the tree specification", text)
            pending.extend(node["children_spec"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, LoadError):
            raise
        raise _malformed(name) from error


def _is_tree_context(keys: Json) -> bool:
    if keys is None:
        return True
    plain = isinstance(keys, list) and all(isinstance(key, str | int) for key in keys)
    return plain and all(not isinstance(key, str) or _is_key(key) for key in keys)


def _is_key(key: str) -> bool:
    # Keyword arguments reach generated source as names.
    return bool(_PATH.fullmatch(key)) and not keyword.iskeyword(key)
