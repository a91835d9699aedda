"""How far Triton is with the kernels of this process; each is compiled once on a machine."""


class Compiles:
    """Hears of each kernel that Triton compiles; another thread may ask."""

    count, running = 0, False  # kernels asked for; whether the last of them is not there yet

    def begin(self, **_: object) -> None:
        self.count, self.running = self.count + 1, True

    def end(self, **_: object) -> None:
        self.running = False


COMPILES = Compiles()
