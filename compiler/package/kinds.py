"""By name, the applications that `qcompile package` makes folders for."""

from collections.abc import Callable

from qcompile.compiler.package.folder import Packaged
from qcompile.compiler.package.genai import package
from qcompile.compiler.package.ort import package_ort
from qcompile.compiler.package.web import package_web

KINDS: dict[str, Callable[..., Packaged]] = {"genai": package, "ort": package_ort, "transformers.js": package_web}
