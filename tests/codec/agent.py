"""Plays the agent: a real proxy is told about pods, by messages that protoc's code wrote or that were typed by hand."""

import os

import support
from seqpacket import Packets, listen
from support import Netns, Program, eventually, main, page

(zds,) = support.messages("zds")
SERVED = {15001, 15006, 15008}
INFO = dict(name="web-1", namespace="alpha", service_account="web")


class Proxy:
    """A proxy in a namespace of its own, and its agent's socket."""

    def __init__(self, **environment):
        self.netns = Netns()
        place = support.directory()
        self.listener = listen(os.path.join(place, "zds.sock"))
        settings = {
            "AMBIDEX_RUN_DIR": place,
            "INPOD_UDS": os.path.join(place, "zds.sock"),
            "AMBIDEX_CA_DIR": os.path.join(place, "ca"),
            "LOCAL_XDS": "{}",
        }
        self.program = Program(self.netns, ["proxy"], {**settings, **environment})

    def connection(self):
        """The next connection; its hello is read and is what the field's agents expect."""
        connection = Packets(self.listener.accept()[0])
        data, fds = connection.receive()
        hello = zds.ZdsHello.FromString(data)
        assert hello.version == zds.V1 and not fds, (hello, fds)
        return Agent(connection)

    def ready(self):
        return page(self.netns, 15021, "/healthz/ready")[0] == 200

    def workloads(self):
        import json

        return json.loads(page(self.netns, 15000, "/config_dump")[1])["workloadState"]


class Agent:
    """The agent's side of one connection."""

    def __init__(self, packets):
        self.packets = packets

    def answer(self):
        data, fds = self.packets.receive()
        assert data and not fds, (data, fds)
        response = zds.WorkloadResponse.FromString(data)
        assert response.WhichOneof("payload") == "ack", response
        # Nothing else is in it: an agent of the field sees what it knows.
        assert response.SerializeToString(deterministic=True) == data, data.hex()
        return response.ack.error

    def raw(self, data, *fds):
        self.packets.send(data, fds)
        return self.answer()

    def ask(self, *fds, **payload):
        return self.raw(zds.WorkloadRequest(**payload).SerializeToString(), *fds)

    def add(self, uid, netns, **info):
        info = zds.WorkloadInfo(**{**INFO, **info})
        return self.ask(netns.fd, add=zds.AddWorkload(uid=uid, workload_info=info))

    def delete(self, uid):
        return self.ask(**{"del": zds.DelWorkload(uid=uid)})

    def keep(self, uid):
        return self.ask(keep=zds.KeepWorkload(uid=uid))

    def snapshot_sent(self):
        return self.ask(snapshot_sent=zds.SnapshotSent())


def conversation():
    """Snapshot, live changes, a reconnect: each answer, and what then listens where."""
    proxy = Proxy()
    first, second, third = Netns(), Netns(), Netns()
    agent = proxy.connection()
    assert agent.add("a", first) == ""
    # The answer promises listeners.
    assert SERVED <= first.listening(), first.listening()
    assert agent.keep("kept") == ""
    assert not proxy.ready(), "ready before the snapshot"
    assert agent.snapshot_sent() == ""
    eventually("ready after the snapshot", proxy.ready)

    assert agent.add("b", second, name="web-2") == ""
    assert SERVED <= second.listening()
    assert agent.add("b", second, name="web-2") == "", "a repetition"
    assert agent.add("b", third, name="web-2") == "", "another namespace"
    assert SERVED <= third.listening()
    eventually("the old namespace is left", lambda: not SERVED & second.listening())
    known = proxy.workloads()
    assert known["a"]["state"] == "Up" and known["b"]["info"]["name"] == "web-2", known
    assert agent.delete("nobody") == ""
    assert agent.delete("b") == ""
    eventually("the pod's listeners are gone", lambda: not SERVED & third.listening())

    agent.packets.close()
    again = proxy.connection()
    assert SERVED <= first.listening(), "what is served goes on without an agent"
    assert not proxy.ready()
    assert again.add("b", second, name="web-2") == ""
    assert SERVED <= first.listening(), "the snapshot is not complete"
    assert again.delete("b") == "", "before the end of the snapshot"
    assert again.add("b", second, name="web-2") == ""
    assert again.snapshot_sent() == ""
    eventually("what the snapshot left out is stopped", lambda: not SERVED & first.listening())
    assert SERVED <= second.listening()
    eventually("ready again", proxy.ready)
    assert proxy.program.alive()


def string(number, text):
    """A field of type string or message, its length in one byte."""
    content = text if isinstance(text, bytes) else text.encode()
    key = number << 3 | 2
    tag = bytes([key]) if key < 128 else bytes([key & 127 | 128, key >> 7])
    return tag + bytes([len(content)]) + content


def tolerance():
    """Fields in another order, fields of the future, fields twice: the last one counts, and nobody minds."""
    proxy = Proxy()
    netns, other = Netns(), Netns()
    agent = proxy.connection()
    # The info before the uid, reversed; the reserved field 4, unknown fields of each wire type in between.
    info = string(3, "web") + string(4, "td.example") + string(2, "alpha") + string(900, "x") + string(1, "web-1")
    varint, eight, four = b"\xf8\x06\x96\x01", b"\xf1\x06" + bytes(8), b"\xed\x06" + bytes(4)
    body = varint + string(2, info) + eight + four + string(1, "a") + string(77, b"\xff\xfe")
    # An unknown field before the request, and one behind it.
    assert agent.raw(string(99, "later") + string(1, body) + varint, netns.fd) == ""
    assert SERVED <= netns.listening()
    known = proxy.workloads()["a"]["info"]
    assert (known["name"], known["namespace"], known["serviceAccount"]) == ("web-1", "alpha", "web"), known
    # The uid twice.
    twice = string(1, "no") + string(2, string(1, "n") + string(2, "ns") + string(3, "sa")) + string(1, "c")
    assert agent.raw(string(1, twice), other.fd) == ""
    assert set(proxy.workloads()) == {"a", "c"}
    # Of two requests in one message the last is meant.
    assert agent.raw(string(5, string(1, "kept")) + string(3, b"")) == ""
    eventually("the snapshot was complete", proxy.ready)
    # A uid in a number that is another message's: number 1 means nothing in a deletion.
    assert agent.raw(string(2, string(1, "a"))) == ""
    assert SERVED <= netns.listening()
    assert agent.raw(string(2, string(1, "c") + string(2, "a"))) == ""
    eventually("deleted by number 2", lambda: not SERVED & netns.listening())
    assert SERVED <= other.listening()


def violations():
    """Each costs its connection, after an answer that says why, and nothing else."""
    proxy = Proxy()
    netns, other = Netns(), Netns()
    agent = proxy.connection()
    assert agent.add("a", netns) == ""
    assert agent.snapshot_sent() == ""
    add = zds.WorkloadRequest(add=zds.AddWorkload(uid="b", workload_info=zds.WorkloadInfo(**INFO))).SerializeToString()
    snapshot = zds.WorkloadRequest(snapshot_sent=zds.SnapshotSent()).SerializeToString()
    long = zds.WorkloadRequest(keep=zds.KeepWorkload(uid="x" * 1100)).SerializeToString()
    pair = (netns.fd, other.fd)
    # What is sent, and a word of the answer.
    rows = [
        ("no message", b"\xff" * 9, (), ""),
        ("cut short", add[:-1], (other.fd,), ""),
        ("a length beyond the packet", b"\x0a\x7f\x0a", (other.fd,), ""),
        ("a message of an unknown type", string(4, b""), (), "unknown request"),
        ("another one", string(7, string(1, "a")), (), "unknown request"),
        ("only unknown fields", string(2000, "x"), (), "unknown request"),
        ("longer than a packet may be", long, (), "1024"),
        ("no namespace", add, (), "0 file descriptors"),
        ("two namespaces", add, pair, "2 file descriptors"),
        ("a namespace that nothing asks for", snapshot, (other.fd,), "1 file descriptors"),
        ("a namespace to be deleted", string(2, string(2, "a")), (other.fd,), "1 file descriptors"),
        ("a request of the extension, not agreed on", string(1001, b""), (), "not agreed on"),
    ]
    for what, data, fds, word in rows:
        error = agent.raw(data, *fds)
        assert error and word in error, f"{what}: {error!r}"
        assert agent.packets.ended(), what
        assert SERVED <= netns.listening() and not SERVED & other.listening(), what
        agent.packets.close()
        # A proxy waits longer for the next connection until it has seen a snapshot.
        agent = proxy.connection()
        assert agent.add("a", netns) == "" and agent.snapshot_sent() == "", what
    for request in [lambda a: a.snapshot_sent(), lambda a: a.keep("a")]:
        error = request(agent)
        assert "snapshot" in error, error
        assert agent.packets.ended()
        agent.packets.close()
        agent = proxy.connection()
        assert agent.add("a", netns) == "" and agent.snapshot_sent() == ""
    agent.packets.close()
    # What is wrong with one pod is said, and the connection goes on.
    agent = proxy.connection()
    with open("/proc/self/ns/mnt") as file:
        error = agent.raw(add, file.fileno())
    assert "not a network namespace" in error, error
    error = agent.ask(other.fd, add=zds.AddWorkload(uid="c"))
    assert "workload_info" in error, error
    assert agent.add("a", netns) == "" and agent.add("b", other) == ""
    assert agent.snapshot_sent() == ""
    assert SERVED <= netns.listening() and SERVED <= other.listening()
    assert proxy.program.alive()


def node_capture():
    """The extension, by its numbers: pods without a descriptor, once the proxy knows how the node captures."""
    proxy = Proxy()
    agent = proxy.connection()
    agent.packets.send(zds.WorkloadRequest(get_netns=zds.GetNetns()).SerializeToString())
    answer, passed = agent.packets.receive()
    assert zds.WorkloadResponse.FromString(answer).HasField("netns"), answer
    assert [os.fstat(fd).st_ino for fd in passed] == [proxy.netns.inode]
    os.close(passed[0])
    configure = zds.ConfigureNode(flow="hybrid", same_node="hbone", node_addresses=[bytes([10, 244, 1, 1])])
    assert agent.ask(configure_node=configure) == ""
    assert SERVED <= proxy.netns.listening(), "one set of listeners, in the proxy's namespace"
    info = zds.WorkloadInfo(**INFO)
    pod = zds.AddWorkload(uid="n", workload_info=info, capture_mode=1, addresses=[bytes([10, 244, 1, 9])])
    assert agent.ask(add=pod) == ""
    # Both kinds on one node.
    netns = Netns()
    assert agent.add("i", netns) == ""
    assert SERVED <= netns.listening()
    assert agent.snapshot_sent() == ""
    assert set(proxy.workloads()) == {"n", "i"}
    assert agent.delete("n") == ""
    eventually("the pod is forgotten", lambda: set(proxy.workloads()) == {"i"})
    error = agent.ask(netns.fd, add=pod)
    assert "1 file descriptors" in error, error
    assert agent.packets.ended()


main({case.__name__: case for case in (conversation, tolerance, violations, node_capture)})
