"""What this machine is, whether what the recipes stand on works here, and what that means for the settings.

    make doctor

Versions, driver, card, memory, disk, the CPU's bf16, a 4-bit matrix product, and PPO's self-test on the embedded base.
What is broken comes with what to do about it, and ends with exit code 1. Nothing is downloaded, nothing is kept.
"""

import logging
import sys

from rlhf_recipes import doctor, machine, terminal
from rlhf_recipes.allocator import grow_segments


def main() -> None:
    """Examine, tell, and exit with 1 if something is broken."""
    terminal.quiet()
    logging.getLogger("rlhf_recipes").setLevel(logging.WARNING)
    grow_segments()
    broken = False
    with machine.chosen("auto", use_cpu=False) as line:
        terminal.say(line if line and "launcher" in line else "")
        for finding in doctor.examine():
            terminal.say(finding)
            broken = broken or finding.broken
    terminal.say("Something is broken: see above." if broken else "All that the recipes stand on works here.")
    sys.exit(int(broken))


if __name__ == "__main__":
    main()
