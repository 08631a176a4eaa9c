"""The import name of the top-level folder `kernels/`.

The folder itself must never be importable as `kernels`: a package of that name exists and transformers
imports it. So the folder has no `__init__.py`, and its files are `minisd.kernels.attention` and so on. A
wheel contains the folder as `minisd/_kernels`.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(next(p for p in (_here / "_kernels", _here.parent / "kernels") if p.is_dir()))]
