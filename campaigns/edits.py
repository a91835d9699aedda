"""Changes in the source of a file: mutants of single lines, and look-ups that tell which lines run.
No line moves.

Not changed: docstrings, strings, f-strings, annotations, decorators, assertions, imports, code for
type checkers alone, ``__repr__``.
"""

import ast
from dataclasses import dataclass
from itertools import pairwise

OPERATORS = {
    **{ast.Lt: ("<", "<=", ">="), ast.LtE: ("<=", "<", ">")},
    **{ast.Gt: (">", ">=", "<="), ast.GtE: (">=", ">", "<")},
    **{ast.Eq: ("==", "!="), ast.NotEq: ("!=", "==")},
    **{ast.In: ("in", "not in"), ast.NotIn: ("not in", "in")},
    **{ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is")},
    **{ast.And: ("and", "or"), ast.Or: ("or", "and")},
    **{ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "//"), ast.FloorDiv: ("//", "*")},
    **{ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<")},
}
HEADERS = {ast.If: "test", ast.While: "test", ast.For: "iter", ast.Match: "subject"}


@dataclass(frozen=True)
class Mutant:
    """``file`` with ``after`` for ``before`` in line ``line``, which is part of the statement that
    begins in line ``start``; 0 where the statement runs when the file is imported."""

    file: str
    line: int
    start: int
    before: str
    after: str

    def __str__(self):
        return f"{self.file}:{self.line}\n  - {self.before.strip()}\n  + {self.after.strip()}"

    def apply(self, path):
        lines = path.read_text().split("\n")
        assert lines[self.line - 1] == self.before
        lines[self.line - 1] = self.after
        path.write_text("\n".join(lines))


class Finder:
    """Finds the single-line changes of a file."""

    def __init__(self, file, source):
        self.file, self.lines, self.found = file, source.encode().split(b"\n"), []
        self.body(ast.parse(source), start=0)

    def change(self, start, line, begin, end, text):
        before = self.lines[line - 1]
        after = before[:begin] + text.encode() + before[end:]
        self.found.append(Mutant(self.file, line, start, before.decode(), after.decode()))

    def replace(self, start, node, *texts):
        if node.lineno == node.end_lineno:
            for text in texts:
                self.change(start, node.lineno, node.col_offset, node.end_col_offset, text)

    def operator(self, start, left, kind, right):
        """Change the operator between two nodes, if all three are in one line."""
        if type(kind) in OPERATORS and left.end_lineno == right.lineno:
            old, *new = OPERATORS[type(kind)]
            gap = self.lines[right.lineno - 1][left.end_col_offset : right.col_offset].decode()
            begin = left.end_col_offset + gap.index(old)
            for text in new:
                self.change(start, right.lineno, begin, begin + len(old), text)

    def body(self, node, start):
        """Statements; ``start`` is 0 outside functions."""
        inside = start or isinstance(node, ast.FunctionDef)
        for statement in ast.iter_child_nodes(node):
            if isinstance(statement, ast.stmt):
                self.statement(statement, statement.lineno if inside else 0)
            elif isinstance(statement, ast.ExceptHandler | ast.match_case):
                self.body(statement, start)

    def statement(self, node, start):
        if isinstance(node, ast.Assert | ast.Import | ast.ImportFrom) or is_text(node):
            return
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if node.name != "__repr__":
                for default in defaults(node):
                    self.expression(default, 0)
                self.body(node, start)
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.If):
            self.replace(start, node.test, "True", "False")
        elif isinstance(node, ast.While) and not isinstance(node.test, ast.Constant):
            self.replace(start, node.test, "False")
        elif isinstance(node, ast.Return) and ast.unparse(node) not in ("return", "return None"):
            self.replace(start, node, "return None")
        elif start and is_dropped(node):
            self.replace(start, node, "pass")
        if isinstance(node, ast.AugAssign):
            self.operator(start, node.target, node.op, node.value)
        for child in ast.iter_child_nodes(node):
            if not isinstance(node, ast.AnnAssign) or child is node.value:
                self.expression(child, start)
        self.body(node, start)

    def expression(self, node, start):
        if isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case | ast.JoinedStr):
            return  # inside an f-string, Python before 3.12 knows no positions
        match node:
            case ast.Constant(value=bool(value)):
                self.replace(start, node, str(not value))
            case ast.Constant(value=int(value)) | ast.Constant(value=float(value)):
                self.replace(start, node, str(value + 1), str(value - 1))
            case ast.UnaryOp(op=ast.Not()):
                self.change(start, node.lineno, node.col_offset, node.col_offset + 4, "")
            case ast.Call(func=ast.Name(id="min" | "max" as name)):
                self.replace(start, node.func, "max" if name == "min" else "min")
            case ast.IfExp():
                self.replace(start, node.test, "True", "False")
            case ast.Compare():
                for left, kind, right in zip(
                    [node.left, *node.comparators[:-1]], node.ops, node.comparators, strict=True
                ):
                    self.operator(start, left, kind, right)
            case ast.BoolOp():
                for left, right in pairwise(node.values):
                    self.operator(start, left, node.op, right)
            case ast.BinOp():
                self.operator(start, node.left, node.op, node.right)
        for child in ast.iter_child_nodes(node):
            self.expression(child, start)


def is_text(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_dropped(node):
    """Whether a mutant goes without the statement.  Not without a name's value: any test fails."""
    if isinstance(node, ast.Assign):
        return all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets)
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Yield | ast.YieldFrom)
    return isinstance(node, ast.AugAssign | ast.Raise | ast.Delete | ast.Break | ast.Continue)


def defaults(node):
    """Default values of a function's parameters."""
    if isinstance(node, ast.ClassDef):
        return []
    return [value for value in (*node.args.defaults, *node.args.kw_defaults) if value]


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
