"""Which subject area a module's documentation belongs to: a map made by hand.

The areas follow the chapters of the Python Library Reference; packages are placed by what they
are for. A name stands for the module and all below it, and the longest name that fits counts.
Modules that serve several areas (logging, typing, functools, contextlib) are left out.
"""

from __future__ import annotations

STDLIB: dict[str, str] = {
    "text processing": "re sre_compile sre_constants sre_parse string difflib textwrap codecs "
    "gettext locale shlex reprlib pprint _strptime",
    "numbers and mathematics": "_pydecimal fractions numbers random statistics colorsys",
    "data types": "_collections_abc abc bisect calendar collections copy copyreg dataclasses "
    "datetime enum graphlib heapq operator types uuid weakref zoneinfo",
    "internet and networks": "asynchat asyncore cgi email ftplib html http imaplib ipaddress "
    "mailbox mailcap mimetypes nntplib poplib smtpd smtplib socket socketserver ssl telnetlib "
    "urllib webbrowser wsgiref xmlrpc",
    "file formats and archives": "_compression aifc base64 bz2 chunk configparser csv dbm gzip "
    "imghdr json lzma netrc pickle pickletools plistlib quopri shelve sndhdr sqlite3 sunau "
    "tarfile tomllib uu wave xdrlib xml zipfile",
    "concurrency": "_threading_local asyncio concurrent contextvars multiprocessing queue sched "
    "selectors signal subprocess threading",
    "files and operating system": "_pyio filecmp fileinput fnmatch genericpath getpass glob io "
    "linecache ntpath nturl2path os pathlib pipes platform posixpath pty shutil stat tempfile "
    "tty",
    "development tools": "ast bdb cProfile code codeop compileall dis distutils doctest "
    "ensurepip imp importlib inspect lib2to3 modulefinder pdb pkgutil profile pstats py_compile "
    "pyclbr pydoc runpy symtable sysconfig tabnanny timeit tokenize trace traceback tracemalloc "
    "unittest venv warnings zipapp zipimport",
    "user interfaces": "argparse cmd curses getopt optparse readline rlcompleter tkinter turtle",
}

PACKAGES: dict[str, str] = {
    "text processing": "idna jinja2 markdown_it markupsafe pandas.core.strings pygments regex "
    "rich.highlighter rich.markup rich.text sklearn.feature_extraction.text tokenizers "
    "numpy._core.strings numpy._core.defchararray",
    "numbers and mathematics": "mpmath networkx.algorithms networkx.linalg numpy.fft "
    "numpy.linalg numpy.polynomial scipy.fft scipy.integrate scipy.interpolate scipy.linalg "
    "scipy.optimize scipy.special scipy.stats sympy.calculus sympy.combinatorics sympy.concrete "
    "sympy.functions sympy.geometry sympy.integrals sympy.matrices sympy.ntheory sympy.polys "
    "sympy.series sympy.sets sympy.solvers",
    "data types": "dateutil numpy.ma pandas.core.arrays pandas.core.dtypes "
    "pandas.core.indexes pandas.core.series pandas.core.frame pandas.core.reshape "
    "pandas.tseries pydantic.types pydantic.fields",
    "internet and networks": "anyio._core._sockets anyio.abc._sockets h11 httpcore httpcore2 "
    "httpx httpx2 huggingface_hub.hf_api huggingface_hub.inference huggingface_hub.utils._http "
    "urllib3 requests aiohttp fsspec.implementations.http fsspec.implementations.ftp "
    "pydantic.networks",
    "file formats and archives": "datasets.io datasets.packaged_modules fsspec.archive "
    "fsspec.parquet fsspec.implementations.zip fsspec.implementations.tar networkx.readwrite "
    "numpy.lib._format_impl numpy.lib._npyio_impl pandas.io pyarrow.csv pyarrow.feather "
    "pyarrow.json pyarrow.orc pyarrow.parquet pyarrow.ipc safetensors scipy.io yaml",
    "concurrency": "anyio joblib._parallel_backends joblib.executor joblib.parallel joblib.pool "
    "torch.distributed.distributed_c10d torch.distributed.elastic torch.distributed.rpc "
    "torch.futures torch.multiprocessing",
    "files and operating system": "anyio._core._fileio filelock fsspec psutil "
    "huggingface_hub._local_folder huggingface_hub.file_download "
    "huggingface_hub.hf_file_system",
    "development tools": "accelerate.test_utils click.testing numpy.distutils numpy.f2py "
    "numpy.testing packaging pandas._testing pandas.util torch.profiler torch.testing "
    "torch.utils.benchmark torch.utils.cpp_extension typer.testing",
    "user interfaces": "click rich tqdm typer",
    "machine learning": "accelerate sklearn torch.ao torch.distributions torch.nn torch.optim "
    "transformers.data transformers.generation transformers.integrations transformers.loss "
    "transformers.pipelines transformers.quantizers transformers.trainer "
    "transformers.trainer_callback transformers.optimization transformers.training_args",
}

# Parts of placed packages that are about something else.
LEFT_OUT = (
    "accelerate.commands accelerate.logging accelerate.utils datasets.utils joblib.externals "
    "pygments.lexers pygments.styles rich._win32_console sklearn.datasets sklearn.utils "
    "torch.nn.parallel"
)


def area_map() -> dict[str, str]:
    """Return the area of every name of the map; an empty one for what is left out."""
    areas: dict[str, str] = {}
    areas.update(dict.fromkeys(LEFT_OUT.split(), ""))
    for table in (STDLIB, PACKAGES):
        for area, names in table.items():
            areas.update(dict.fromkeys(names.split(), area))
    return areas


def area_of(module: str, areas: dict[str, str]) -> str | None:
    """Return the area of the longest name in the map that `module` is or lies below."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        area = areas.get(".".join(parts[:length]))
        if area is not None:
            return area or None
    return None
