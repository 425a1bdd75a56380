"""What is expected of (client, method) besides the law: refusals, and faults that are known.

Everything that a change of the library may alter for the better stands here.
"""

#: Refused, with a message that this pattern finds.
REFUSED: dict[tuple[str, str], str] = {}

#: Wrong today; the test is a strict expected failure with this reason.
FAULTS: dict[tuple[str, str], str] = {}

#: Clients of which some parameters are turned into dense arrays, and a pattern of these.
DENSE: dict[str, str] = {}
