"""A real S3 server on loopback: OpenStack Swift with its s3api, four processes on free ports.

Tests push to it and pull from it: ranges, multipart uploads, listing and conditional creation are the server's own.
``kill`` ends all four at once, as a power cut would; ``start`` brings them up again over the same files.
"""

import getpass
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.store import S3Store

BUCKET = "team"
ACCESS, SECRET = "test:tester", "testing-secret"
REGION = "us-east-1"

_BIN = Path(sys.executable).parent
_COMMON = """[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {root}/etc
devices = {root}/srv
mount_check = false
fallocate_reserve = 0
disable_fallocate = true
log_address = {root}/no-syslog
log_level = ERROR
"""
_STORAGE = "[pipeline:main]\npipeline = {name}-server\n[app:{name}-server]\nuse = egg:swift#{name}\n"
_FILTERS = {
    "catch_errors": "", "gatekeeper": "", "listing_formats": "", "copy": "", "slo": "",
    "s3api": f"location = {REGION}\ns3_acl = false\nmin_segment_size = 1\n",
    "tempauth": f"user_test_tester = {SECRET} .admin\n",
}  # fmt: skip
_ORDER = ("catch_errors", "gatekeeper", "listing_formats", "s3api", "tempauth", "copy", "slo")
_PROXY = (
    f"[pipeline:main]\npipeline = {' '.join(_ORDER)} proxy-server\n"
    "[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\nallow_account_management = true\n"
    + "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n{_FILTERS[name]}" for name in _ORDER)
)
_SWIFT = """[swift-hash]
swift_hash_path_prefix = lab
swift_hash_path_suffix = lab
[storage-policy:0]
name = Policy-0
default = yes
"""


class S3Server:
    """The server; ``root`` keeps its configuration and all objects."""

    def __init__(self, root: Path):
        self.root = root
        self.ports = dict(zip(("account", "container", "object", "proxy"), _free_ports(4), strict=True))
        self.endpoint = f"http://127.0.0.1:{self.ports['proxy']}"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._configure()

    @property
    def environment(self) -> dict[str, str]:
        """What a client's environment holds."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint, "AWS_REGION": REGION,
            "AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET,
        }  # fmt: skip

    def start(self) -> None:
        """Starts the processes and waits until the server answers."""
        for name in self.ports:
            command = [str(_BIN / f"swift-{name}-server"), str(self.root / "etc" / f"{name}.conf")]
            log = (self.root / f"{name}.log").open("ab")
            self._processes.append(
                subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
            )
            log.close()
        deadline = time.monotonic() + 60
        while not self._answers():
            if time.monotonic() > deadline or any(process.poll() is not None for process in self._processes):
                self.kill()
                raise RuntimeError("".join(log.read_text() for log in self.root.glob("*.log")))
            time.sleep(0.1)

    def kill(self) -> None:
        """Kills all processes, at once and without warning."""
        for process in self._processes:
            process.send_signal(signal.SIGKILL)
        for process in self._processes:
            process.wait()
        self._processes = []

    def client(self) -> S3Store:
        """obstore's own client, for looking at what is there."""
        return S3Store(
            BUCKET, endpoint=self.endpoint, region=REGION, access_key_id=ACCESS, secret_access_key=SECRET,
            client_options={"allow_http": True}, retry_config={"max_retries": 0},
        )  # fmt: skip

    def keys(self) -> list[str]:
        """Keys of all objects, sorted."""
        return sorted(found["path"] for page in obstore.list(self.client()) for found in page)

    def create_bucket(self) -> None:
        """Creates the bucket that tests use; it may be there."""
        url = obstore.sign(self.client(), "PUT", "", timedelta(minutes=5))
        urllib.request.urlopen(urllib.request.Request(url, method="PUT")).close()

    def _answers(self) -> bool:
        try:
            self.create_bucket()
        except urllib.error.HTTPError as error:
            return error.code == 409  # the bucket is there, from before it was killed
        except OSError:
            return False
        return True

    def _configure(self) -> None:
        etc = self.root / "etc"
        etc.mkdir(parents=True)
        (self.root / "srv" / "d1").mkdir(parents=True)
        for name, port in self.ports.items():
            text = _COMMON.format(port=port, user=getpass.getuser(), root=self.root)
            (etc / f"{name}.conf").write_text(text + (_PROXY if name == "proxy" else _STORAGE.format(name=name)))
            if name != "proxy":
                builder = str(etc / f"{name}.builder")
                for arguments in (["create", "10", "1", "1"], ["add", f"r1z1-127.0.0.1:{port}/d1", "1"], ["rebalance"]):
                    subprocess.run(
                        [str(_BIN / "swift-ring-builder"), builder, *arguments], check=True, capture_output=True
                    )
        (etc / "swift.conf").write_text(_SWIFT)


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
