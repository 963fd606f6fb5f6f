"""launch/tpu_pod.sh and the other scripts for many hosts: hosts, locks and connections that are lost on the way."""

import pytest
from test_pods import cloud as cloud
from test_pods import pod as pod


@pytest.mark.parametrize(("codes", "checks"), [([73, 73, 73, 0], 4), ([73], 10), ([73, 65], 2)])
def test_the_lock_of_a_lost_host_is_waited_for(pod, codes, checks):
    """NFS keeps it until the server notices the loss."""
    (pod.path / "check").write_text("".join(f"{code}\n" for code in codes))
    done = pod.run(*pod.command)
    assert done.returncode == codes[-1], done.stderr
    assert [pod.verbs().count(verb) for verb in ("create", "ssh check")] == [1, checks]
    assert "the run directory is locked, perhaps still by a host that is lost: checking again (try 1 of 10)" in done.stderr
