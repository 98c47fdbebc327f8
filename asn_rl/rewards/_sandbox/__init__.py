"""What runs in a sandbox's own process. Standard library only, and little of it: every program pays for the imports.

`typing`, `collections`, `contextlib` and `signal` together would take as long as all the rest. Not imported by the
library: `asn_rl.rewards.sandbox` starts a fresh interpreter on `child`.
"""
