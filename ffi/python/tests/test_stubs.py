"""The stubs beside the module: what the one promises the other has, and the reverse."""

import ast
import inspect
import pathlib

import pytest

import kvfabric

STUBS = pathlib.Path(kvfabric.__file__).with_name("__init__.pyi")
TREE = ast.parse(STUBS.read_text())
CLASSES = {node.name: node for node in TREE.body if isinstance(node, ast.ClassDef)}
NATIVE = {name: node for name, node in CLASSES.items() if not name.endswith("Error")}
# Where Python puts what every object has.
COMMON = set(dir(object)) | {"__module__"}
# Protocols of Python rather than members to be called by name.
SPECIAL = {"__len__", "__await__"}


def functions(node):
    return {child.name: child for child in node.body if isinstance(child, ast.FunctionDef)}


def is_property(function):
    return any(isinstance(d, ast.Name) and d.id == "property" for d in function.decorator_list)


def parameters(function):
    """(name, kind) of each parameter but `self` or `cls`."""
    arguments = function.args
    plain = [argument.arg for argument in arguments.posonlyargs + arguments.args]
    named = [argument.arg for argument in arguments.kwonlyargs]
    return [(name, False) for name in plain if name not in ("self", "cls")] + [
        (name, True) for name in named
    ]


def signature(member):
    kinds = inspect.signature(member).parameters.values()
    return [(p.name, p.kind is p.KEYWORD_ONLY) for p in kinds if p.name != "self"]


def test_every_public_name_is_in_the_stubs_and_the_reverse():
    imported = {
        alias.asname
        for node in TREE.body
        if isinstance(node, ast.ImportFrom) and node.module in ("_reports", "_options")
        for alias in node.names
    }
    declared = set(CLASSES) | imported | set(functions(TREE))
    variables = {node.target.id for node in TREE.body if isinstance(node, ast.AnnAssign)}
    assert declared | variables == set(kvfabric.__all__)
    assert all(hasattr(kvfabric, name) for name in kvfabric.__all__)


@pytest.mark.parametrize("name", sorted(NATIVE))
def test_a_class_has_the_members_that_its_stub_has(name):
    there = {
        member
        for member in dir(getattr(kvfabric, name))
        if member not in COMMON and (not member.startswith("_") or member in SPECIAL)
    }
    promised = {member for member in functions(NATIVE[name]) if member != "__new__"}
    assert there == promised


@pytest.mark.parametrize("name", sorted(NATIVE))
def test_a_class_takes_the_parameters_that_its_stub_has(name):
    actual = getattr(kvfabric, name)
    for member, function in functions(NATIVE[name]).items():
        if is_property(function):
            assert inspect.isgetsetdescriptor(getattr(actual, member)), member
        elif member == "__new__":
            assert signature(actual) == parameters(function), member
        elif member not in SPECIAL:
            assert signature(getattr(actual, member)) == parameters(function), member


def test_functions_take_the_parameters_that_their_stubs_have():
    for name, function in functions(TREE).items():
        assert sorted(signature(getattr(kvfabric, name))) == sorted(parameters(function))


def test_everything_public_says_what_it_is():
    for name in kvfabric.__all__:
        thing = getattr(kvfabric, name)
        assert name == "__version__" or inspect.getdoc(thing), name
    for name, node in NATIVE.items():
        for member in functions(node):
            if member not in SPECIAL and member != "__new__":
                assert inspect.getdoc(getattr(getattr(kvfabric, name), member)), f"{name}.{member}"
