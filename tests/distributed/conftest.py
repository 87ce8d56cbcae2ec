"""Two nodes over ssh need network namespaces, so root, and iproute2, openssh-server and pdsh: without them that test is not collected."""

from tests.helpers import why_not

reason = why_not("ip", "sshd", "ssh", "ssh-keygen", "pdsh")
collect_ignore = ["test_hostfile.py"] if reason else []


def pytest_report_header() -> str:
    return f"not collected: tests/distributed/test_hostfile.py ({reason})" if reason else "nodes over ssh: tested"
