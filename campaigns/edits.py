"""Changes in the source of a file: mutants, by cosmic-ray's operators and some of our own, and
look-ups that tell which lines run.

Of an operator's replacements the nearest and the opposite are tried: any test notices ``<<`` for
``+``.  Not changed: strings, f-strings, annotations, decorators, assertions, imports, code for type
checkers alone, ``__repr__``.
"""

import ast
import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from textwrap import indent

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

BINARY = """Add_Sub Sub_Add Mul_FloorDiv FloorDiv_Mul Div_Mul Mod_FloorDiv Pow_Mul LShift_RShift
    RShift_LShift BitOr_BitAnd BitAnd_BitOr BitXor_BitOr"""
COMPARISON = """Eq_NotEq NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Is_IsNot
    IsNot_Is"""
UNARY = "Delete_Not Delete_USub Delete_Invert"
OTHERS = """ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd
    ReplaceBreakWithContinue ReplaceContinueWithBreak NumberReplacer ExceptionReplacer
    ZeroIterationForLoop"""
NAMES = [
    *(f"ReplaceBinaryOperator_{name}" for name in BINARY.split()),
    *(f"ReplaceComparisonOperator_{name}" for name in COMPARISON.split()),
    *(f"ReplaceUnaryOperator_{name}" for name in UNARY.split()),
    *OTHERS.split(),
]
OPERATORS = [get_operator(f"core/{name}")() for name in NAMES]
HEADERS = {ast.If: "test", ast.While: "test", ast.For: "iter", ast.Match: "subject"}
OTHER = {ast.In: ast.NotIn, ast.NotIn: ast.In, "min": "max", "max": "min"}
OTHER |= {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.BitOr: ast.BitAnd}


@dataclass(frozen=True)
class Mutant:
    """``file`` with the lines ``after`` for ``before``, the first of which is ``line`` and comes
    behind ``behind``.  ``start`` is the line whose look-up says that a test reaches the change; 0
    where it runs when the file is imported."""

    file: str
    line: int
    start: int
    behind: str
    before: str
    after: str
    source: str

    def __str__(self):
        marks = {"    ": self.behind, "  - ": self.before, "  + ": self.after}
        lines = [indent(text, mark) for mark, text in marks.items()]
        return "\n".join([f"{self.file}:{self.line}", *lines])


class Edit:
    """A change that ``made`` makes of a source, or of which it makes None."""

    def __init__(self, file: str, source: str, start: int, made: Callable[[], str | None]):
        self.file, self.source, self.start, self.made = file, source, start, made

    def mutant(self) -> Mutant | None:
        """None where the change is none, or no Python."""
        source = self.made()
        try:
            same = source is None or ast.dump(ast.parse(source)) == ast.dump(ast.parse(self.source))
        except SyntaxError:
            return None
        if same:
            return None
        old, new = self.source.split("\n"), source.split("\n")
        first = next(
            n for n, lines in enumerate(zip(old, new, strict=False)) if len(set(lines)) > 1
        )
        while old[-1] == new[-1] and min(len(old), len(new)) > first + 1:
            del old[-1], new[-1]
        behind, before, after = (
            "\n".join(map(str.strip, lines))
            for lines in (old[max(first - 1, 0) : first], old[first:], new[first:])
        )
        return Mutant(self.file, first + 1, self.start, behind, before, after, source)


def edits(file: str, source: str) -> list[Edit]:
    """All changes of a file, in its order within each operator."""
    tree = ast.parse(source)
    skipped, starts, found = places_of(tree), starts_of(tree), []
    counts: Counter[int] = Counter()
    for node in ast_nodes(get_ast(source)):
        for number, operator in enumerate(OPERATORS):
            for begin, _ in operator.mutation_positions(node):
                made = partial(mutate_code, source, operator, counts[number])
                counts[number] += 1
                if not any(first <= begin < last for first, last in skipped):
                    found.append(Edit(file, source, starts[begin[0]], made))
    for node in ast.walk(tree):
        if hasattr(node, "lineno"):
            begin = node.lineno, node.col_offset
            if not any(first <= begin < last for first, last in skipped):
                for old, text in our_changes(node, inside=starts[node.lineno] > 0):
                    made = partial(spliced, source, old, text)
                    found.append(Edit(file, source, starts[old.lineno], made))
    return found


def our_changes(node, inside):
    """What cosmic-ray has no operator for: pairs of a node and the text in its place.  A name's
    value is not dropped: any test fails."""
    match node:
        case ast.If(test=test) | ast.IfExp(test=test):
            yield from ((test, "True"), (test, "False"))
        case ast.While(test=test) if not isinstance(test, ast.Constant):
            yield test, "False"
        case ast.Return(value=value) if value and ast.unparse(value) not in ("None", "False"):
            yield value, "None"
        case ast.Call(func=ast.Name(id="min" | "max" as name)):
            yield node.func, OTHER[name]
        case ast.Compare(ops=[ast.In() | ast.NotIn() as kind]):
            yield node, f"({with_other(node, ops=[OTHER[type(kind)]()])})"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) if inside:
            yield node, "pass"
        case ast.Expr(value=value) if inside and not isinstance(value, ast.Yield | ast.YieldFrom):
            yield node, "pass"
        case ast.AugAssign(op=kind):
            yield node, "pass"
            if type(kind) in OTHER:
                yield node, with_other(node, op=OTHER[type(kind)]())
        case ast.Raise() | ast.Delete() | ast.Break() | ast.Continue():
            yield node, "pass"


def with_other(node, **fields):
    """The source of ``node`` with these fields."""
    other = copy.copy(node)
    vars(other).update(fields)
    return ast.unparse(other)


def spliced(source, node, text):
    """``source`` with ``text`` for ``node``."""
    lines = source.encode().split(b"\n")
    first, last = node.lineno - 1, node.end_lineno - 1
    end = lines[last][node.end_col_offset :]
    lines[first : last + 1] = [lines[first][: node.col_offset] + text.encode() + end]
    return b"\n".join(lines).decode()


def places_of(tree):
    """Beginnings and ends of what is not changed."""
    skipped = []
    for node in ast.walk(tree):
        match node:
            case ast.Assert() | ast.Import() | ast.ImportFrom() | ast.JoinedStr():
                skipped.append(node)
            case ast.Expr(value=ast.Constant()):
                skipped.append(node)
            case ast.If() if "TYPE_CHECKING" in ast.unparse(node.test):
                skipped.append(node)
            case ast.FunctionDef():
                skipped += [*node.decorator_list, *([node.returns] if node.returns else [])]
                if node.name == "__repr__":
                    skipped.append(node)
            case ast.ClassDef():
                skipped += node.decorator_list
            case ast.arg() | ast.AnnAssign() if node.annotation:
                skipped.append(node.annotation)
    return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in skipped]


def starts_of(tree):
    """Line -> the first line of the statement in a function that it is part of, or 0.  ``except``
    is reached where what follows it is."""
    starts: Counter[int] = Counter()

    def visit(node, inside):
        for child in ast.iter_child_nodes(node):
            within = inside or isinstance(node, ast.FunctionDef)
            if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case) and within:
                first = child if isinstance(child, ast.stmt) else child.body[0]
                last = getattr(child, "end_lineno", first.lineno)
                begin = getattr(child, "lineno", first.lineno)
                for line in range(begin, last + 1):
                    starts[line] = 0 if isinstance(child, ast.FunctionDef) else first.lineno
            visit(child, within)

    visit(tree, False)
    return starts


def watched(source, number):
    """``source`` with a look-up before each statement of each line; no line moves."""
    lines, first = source.encode().split(b"\n"), "from reached import REACH as __reach__; "
    added = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.stmt) or is_text(node):
            continue
        look, header = f"__reach__[{number + node.lineno}]", None
        if type(node) in HEADERS:
            header = getattr(node, HEADERS[type(node)])
        elif isinstance(node, ast.With):
            header = node.items[0].context_expr
        elif not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Try):
            added.append((node.lineno, node.col_offset, f"{look}; "))
        if header:
            added.append((header.lineno, header.col_offset, f"{look} or ("))
            added.append((header.end_lineno, header.end_col_offset, ")"))
    line, column, text = min(added)
    added[added.index((line, column, text))] = (line, column, first + text)
    for line, column, text in sorted(added, reverse=True):
        old = lines[line - 1]
        lines[line - 1] = old[:column] + text.encode() + old[column:]
    return b"\n".join(lines).decode()


def is_text(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
