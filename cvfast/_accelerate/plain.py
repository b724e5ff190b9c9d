"""Which modules have a forward whose graph is the same for every input: those that can be rewritten without a doubt.

torch.fx records one run with stand-ins for the inputs. That the record holds for all inputs is proved from the source:
the code is straight, and what it asks (`if`) or loops over hangs on the module's own attributes alone, which are
watched from then on. Code that does anything else is not plain. Submodules that are plain, too, are part of the graph
of the module around them, as long as nobody watches their calls.
"""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import FunctionType

import torch
from torch import Tensor, fx
from torch.nn import Dropout, Module, ModuleList, Sequential
from torch.nn.modules.module import _has_any_global_hook

from cvfast._accelerate.unchanged import Answer, Snapshot

_CONSTANTS = (type(None), bool, int, float, str)
_TORCH = (torch, torch.nn.functional)
_COMPARE = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda item, container: item in container,
    ast.NotIn: lambda item, container: item not in container,
}
_BAKED = ("is_", "get_", "set_", "manual_", "rand", "normal", "bernoulli", "empty", "seed")


class NotPlain(Exception):
    """Why a module's forward is left as it is."""


def original(cls: type[Module]) -> type[Module]:
    """The class that a module of class `cls` had before it was fused; `cls` itself for others."""
    return cls.__dict__.get("_cvfast_original", cls)


def unwatched(module: Module) -> bool:
    """Whether nobody sees a call of `module`, by hooks of its own or in the place of its forward."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


@dataclass
class Facts:
    """What a graph depends on besides the input.

    children: the modules that lie in a module. values: of attributes. inlined: submodules whose forwards are part of
    the graph, so that nobody may watch them, with their classes.
    """

    children: list[tuple[Module, tuple[Module | None, ...]]] = field(default_factory=list)
    values: list[tuple[Module, str, object]] = field(default_factory=list)
    inlined: list[tuple[Module, type[Module]]] = field(default_factory=list)
    _held: Answer | None = field(default=None, init=False, repr=False, compare=False)

    def watch_children(self, module: Module) -> None:
        if all(module is not watched for watched, _ in self.children):
            self.children.append((module, tuple(module._modules.values())))

    def hold(self) -> bool:
        """Whether all is as it was."""
        if torch.compiler.is_compiling():
            return self._hold()
        if self._held is None:
            self._held = Answer(self._hold, self._look)
        return self._held()

    def _look(self, snapshot: Snapshot) -> None:
        for module, _ in self.children:
            snapshot.children(module)
        for module, name, _ in self.values:
            snapshot.attribute(module, name)
        for module, _ in self.inlined:
            snapshot.unwatched(module)

    def _hold(self) -> bool:
        for module, children in self.children:
            if tuple(module._modules.values()) != children:
                return False
        for module, name, value in self.values:
            if getattr(module, name, NotPlain) != value:
                return False
        for module, cls in self.inlined:
            if not unwatched(module) or original(type(module)) is not cls:
                return False
        return not (self.inlined and _has_any_global_hook())


_OWN = ("__call__", "__reduce__", "__reduce_ex__", "__deepcopy__", "__getnewargs__", "__getnewargs_ex__")


def _prove(module: Module, facts: Facts) -> None:
    """Raises NotPlain if the graph of `module`'s own forward might differ from one input to the next."""
    cls = original(type(module))
    if "forward" in module.__dict__:
        raise NotPlain("its forward was replaced on this very module")
    own = [name for name in _OWN if getattr(cls, name, None) is not getattr(Module, name, None)]
    if own or isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)):
        raise NotPlain("its class has its own way of being called or copied")
    facts.watch_children(module)
    if cls.forward is not Sequential.forward:
        _Proof(module, facts).function(cls.forward)


def trace(module: Module, matters: Callable[[Module], bool]) -> tuple[fx.Graph, Facts]:
    """The graph of `module`'s own forward, and what it depends on.

    Submodules are one node each, but for those that are plain and hold a module that `matters`: these are parts of the
    graph. Raises NotPlain if the graph might differ from one input to the next.
    """
    facts = Facts()
    _prove(module, facts)
    try:
        return _Tracer(module, facts, matters).trace(module), facts
    except NotPlain:
        raise
    except Exception as error:  # whatever the code does to a stand-in
        raise NotPlain(f"torch.fx cannot trace it: {error}") from error


class _Proxy(fx.Proxy):
    """torch.fx's stand-in, which keeps `x += y` apart from `x = x + y`."""


def _in_place(name: str) -> Callable:
    target = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", target, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # as parameters are: a number read from one would be fixed in the graph

    def __init__(self, module: Module, facts: Facts, matters: Callable[[Module], bool]) -> None:
        super().__init__()
        self._facts, self._matters = facts, matters
        self._known = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}

    def is_leaf_module(self, module: Module, qualified_name: str) -> bool:
        return True

    def call_module(self, module: Module, forward: Callable, args: tuple, kwargs: dict):
        if len(args) == 1 and not kwargs and self._hands_on(module):
            return args[0]
        if not self._inlines(module):
            return super().call_module(module, forward, args, kwargs)
        return original(type(module)).forward(module, *args, **kwargs)

    def _hands_on(self, module: Module) -> bool:
        """Whether `module` gives back its input, as dropout of nothing does; `facts` then has why."""
        if original(type(module)) is not Dropout or module.p != 0 or not unwatched(module):
            return False
        self._facts.values.append((module, "p", module.p))
        self._facts.inlined.append((module, Dropout))
        return True

    def _inlines(self, module: Module) -> bool:
        """Whether `module` becomes part of the graph; if so, `facts` has what that depends on."""
        if any(module is known for known, _ in self._facts.inlined):
            return True
        if self._matters(module) or not any(map(self._matters, module.modules())) or not unwatched(module):
            return False
        facts = Facts()
        try:
            _prove(module, facts)
        except NotPlain:
            return False
        for watched, _ in facts.children:
            self._facts.watch_children(watched)
        self._facts.values += facts.values
        self._facts.inlined.append((module, original(type(module))))
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, argument):
        if isinstance(argument, Tensor) and id(argument) not in self._known:
            raise NotPlain("it computes with tensors that are neither its input nor its own")
        return super().create_arg(argument)


@cache
def _source(function: FunctionType) -> ast.FunctionDef:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError) as error:
        raise NotPlain("its source cannot be read") from error
    decorators = [ast.unparse(decorator) for decorator in getattr(tree, "decorator_list", ())]
    marked = decorators == ["torch.jit.unused"] and function.__globals__.get("torch") is torch  # the function itself
    if not isinstance(tree, ast.FunctionDef) or (decorators and not marked) or hasattr(function, "__wrapped__"):
        raise NotPlain(f"{function.__name__} is decorated or no plain function")
    return tree


class _Proof:
    """Goes through the source of a method and of the methods that it calls; `facts` takes what they ask of `module`."""

    def __init__(self, module: Module, facts: Facts) -> None:
        self.module, self.facts, self.open = module, facts, []

    def function(self, function: Callable) -> None:
        if not isinstance(function, FunctionType) or function in self.open:
            raise NotPlain("its forward is no plain function")
        tree, args = _source(function), _source(function).args
        if args.vararg or args.kwarg or args.kwonlyargs or args.posonlyargs or not args.args:
            raise NotPlain(f"{function.__name__} takes * or ** arguments")
        outer = getattr(self, "code", None)
        self.open.append(function)
        self.code = (function, args.args[0].arg)
        for statement in tree.body:
            self.statement(statement)
        self.open.pop()
        self.code = outer

    def refuse(self, node: ast.AST) -> None:
        line = ast.unparse(node).partition("\n")[0]
        raise NotPlain(f"{self.code[0].__name__} is not plain code: {line}")

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Pass() | ast.Expr(value=ast.Constant()):
                pass
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name)))) if name != self.code[1]:
                self.expression(node.value)
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self.target(target)
                self.expression(value)
            case ast.AnnAssign(target=ast.Name(), value=value) | ast.AugAssign(target=ast.Name(), value=value):
                self.expression(value)
            case ast.Return(value=value):
                self.expression(value)
            case ast.If(test=test, body=body, orelse=orelse):
                for statement in body if self.answer(test) else orelse:
                    self.statement(statement)
            case ast.For(target=target, iter=iterated, body=body, orelse=[]):
                self.target(target)
                if not isinstance(self.attribute(iterated), (ModuleList, Sequential)):
                    self.refuse(node)
                for statement in body:
                    self.statement(statement)
            case _:
                self.refuse(node)

    def target(self, node: ast.expr) -> None:
        names = node.elts if isinstance(node, ast.Tuple) else [node]
        if not all(isinstance(name, ast.Name) and name.id != self.code[1] for name in names):
            self.refuse(node)

    def question(self, node: ast.expr) -> object:
        """The value of an expression that must hang on the module's attributes alone, which are watched."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self.answer(operand)
            case ast.BoolOp(op=op, values=values):
                answers = [self.answer(value) for value in values]
                decides = [answer for answer in answers[:-1] if bool(answer) == isinstance(op, ast.Or)]
                return (*decides, answers[-1])[0]
            case ast.Compare(left=left, ops=ops, comparators=others):
                identity = all(isinstance(op, (ast.Is, ast.IsNot)) for op in ops)
                operands = [(self.question if identity else self.answer)(value) for value in (left, *others)]
                try:
                    return all(_COMPARE[type(op)](a, b) for op, a, b in zip(ops, operands, operands[1:], strict=False))
                except TypeError:  # as Python would say
                    self.refuse(node)
            case ast.Call(func=callee, args=[], keywords=[]) if self.is_scripting(callee):
                return False
            case _:
                return self.attribute(node)

    def answer(self, node: ast.expr) -> object:
        """As question, a value that nobody changes in place."""
        value = self.question(node)
        if isinstance(value, Tensor):
            self.refuse(node)
        return value

    def is_scripting(self, node: ast.expr) -> bool:
        """Whether this is torch.jit.is_scripting, which is asked by Python code."""
        try:
            return self.value(node) is torch.jit.is_scripting
        except (AttributeError, KeyError):
            return False

    def expression(self, node: ast.expr | None) -> None:
        match node:
            case None | ast.Constant():
                pass
            case ast.Name(id=name):
                if name == self.code[1] or name not in self.code[0].__code__.co_varnames:
                    self.refuse(node)
            case ast.Attribute():
                if self.root(node) == self.code[1]:
                    self.attribute(node)
                else:
                    self.expression(node.value)
            case ast.Call(func=callee, args=args, keywords=keywords):
                if any(isinstance(arg, ast.Starred) for arg in args) or any(k.arg is None for k in keywords):
                    self.refuse(node)
                for value in (*args, *(keyword.value for keyword in keywords)):
                    self.expression(value)
                self.callee(callee, bool(args or keywords))
            case ast.Tuple(elts=values) | ast.List(elts=values):
                for value in values:
                    self.expression(value)
            case ast.Dict(keys=keys, values=values):
                for value in (*keys, *values):
                    self.expression(value)
            case ast.Subscript(value=value, slice=index):
                if self.root(value) == self.code[1]:
                    self.attribute(node)
                else:
                    self.expression(value)
                    self.expression(index)
            case ast.Slice(lower=lower, upper=upper, step=step):
                for value in (lower, upper, step):
                    self.expression(value)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
                self.expression(operand)
            case ast.BinOp(left=left, right=right):
                self.expression(left)
                self.expression(right)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                self.expression(body if self.answer(test) else orelse)
            case ast.BoolOp() | ast.Compare():
                self.question(node)
            case _:
                self.refuse(node)

    def callee(self, node: ast.expr, arguments: bool) -> None:
        root = self.root(node)
        if root == self.code[1]:
            self.attribute(node, called=True)
        elif root in self.code[0].__code__.co_varnames or (root is None and isinstance(node, ast.Attribute)):
            if isinstance(node, ast.Attribute):  # a method of a value; else a module that a loop gives
                self.expression(node.value)
        elif not (arguments and self.is_torchs(node)):
            self.refuse(node)

    def is_torchs(self, node: ast.expr) -> bool:
        """Whether this is a function of torch or torch.nn.functional that computes with its arguments."""
        try:
            value = self.value(node)
        except (AttributeError, KeyError):
            return False
        name = getattr(value, "__name__", "")
        return not name.startswith(_BAKED) and any(getattr(owner, name, None) is value for owner in _TORCH)

    def value(self, node: ast.expr) -> object:
        if isinstance(node, ast.Attribute):
            return getattr(self.value(node.value), node.attr)
        return self.code[0].__globals__[node.id]  # KeyError: a builtin, or from an enclosing function

    @staticmethod
    def root(node: ast.expr) -> str | None:
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            node = node.value
        return node.id if isinstance(node, ast.Name) else None

    def attribute(self, node: ast.expr, called: bool = False) -> object:
        """The value of self.a, self.a.b or self.a[0], which is watched; with `called`, it may be a method."""
        match node:
            case ast.Name(id=name) if name == self.code[1]:
                return self.module
            case ast.Attribute(value=value, attr=name):
                owner = self.attribute(value)
            case ast.Subscript(value=value, slice=ast.Constant(value=index)):
                owner = self.attribute(value)
                if not isinstance(owner, (ModuleList, Sequential)) or type(index) is not int:
                    self.refuse(node)
                self.facts.watch_children(owner)
                return owner[index]
            case _:
                self.refuse(node)
        if not isinstance(owner, Module):
            self.refuse(node)
        return self.member(node, owner, name, called)

    def member(self, node: ast.expr, owner: Module, name: str, called: bool) -> object:
        if isinstance(getattr(type(owner), name, None), FunctionType) and name not in owner.__dict__:
            if not called or owner is not self.module:
                self.refuse(node)
            self.function(getattr(type(owner), name))
            return None
        if isinstance(inspect.getattr_static(type(owner), name, None), property):
            self.refuse(node)
        tensors = owner._parameters | owner._buffers  # while torch.fx traces, attributes are stand-ins for them
        value = tensors[name] if name in tensors else getattr(owner, name, NotPlain)
        if isinstance(value, Module):
            self.facts.watch_children(owner)
            if isinstance(value, (ModuleList, Sequential)):
                self.facts.watch_children(value)
        elif isinstance(value, Tensor):
            if name not in tensors:
                self.refuse(node)
        elif type(value) in _CONSTANTS or (type(value) is tuple and all(type(v) in _CONSTANTS for v in value)):
            self.facts.values.append((owner, name, value))
        elif called and any(getattr(o, getattr(value, "__name__", ""), None) is value for o in _TORCH):
            self.facts.values.append((owner, name, value))  # such as self.act = F.relu
        else:
            self.refuse(node)
        return value
