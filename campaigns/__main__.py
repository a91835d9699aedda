"""``python -m campaigns``: all campaigns, or one of them."""

import argparse
import subprocess
import sys
from importlib import import_module

from campaigns import CAMPAIGNS
from campaigns.runner import parse, play

ABOUT = """\
Attacks that take minutes to hours, one after the other; or one of them:

  python -m campaigns                          all of them: some hours
  python -m campaigns races                    one, until its count is reached
  python -m campaigns races session --count 9  one part of it, nine rounds
  python -m campaigns races --help             its parts and options

Each part prints a report, one line of JSON: what was done, and what was "wrong".  The exit code is
1 where anything was.  The seed and the part decide all that is left to chance but the timing:
"python -m campaigns NAME PART --seed N" with the report's seed makes the same choices again.

"""


def main() -> None:
    words = sys.argv[1:]
    names = [campaign.name for campaign in CAMPAIGNS]
    if words and words[0] in names:
        module = import_module(f"campaigns.{words[0].replace('-', '_')}")
        given = parse(words[0], module.__doc__, module.ATTACK, words[1:])
        raise SystemExit(not play(words[0], module.ATTACK, given))
    lines = [f"  {campaign.name:13} {campaign.about}" for campaign in CAMPAIGNS]
    parser = argparse.ArgumentParser(
        prog="python -m campaigns",
        usage="%(prog)s [NAME [PART...] [OPTION...]]",
        description=ABOUT + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(words)
    failed = []
    for name in names:
        print(f"python -m campaigns {name}", file=sys.stderr, flush=True)
        if subprocess.run([sys.executable, "-m", "campaigns", name]).returncode:
            failed.append(name)
    raise SystemExit(f"wrong: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
