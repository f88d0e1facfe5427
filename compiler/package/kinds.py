"""By name, the applications that `qcompile package` makes folders for."""

from collections.abc import Callable

from qcompile.compiler.package.folder import Packaged, package
from qcompile.compiler.package.web import package_web

KINDS: dict[str, Callable[..., Packaged]] = {"genai": package, "transformers.js": package_web}
