"""Plays the proxy: a real agent announces pods to it, and takes its answers for what they are."""

import base64
import http.client
import ipaddress
import json
import os
import socket
import threading

import support
from seqpacket import connect
from support import Netns, Program, eventually, main

(zds,) = support.messages("zds")
HELLO = zds.ZdsHello(version=zds.V1).SerializeToString()
ACK = zds.WorkloadResponse(ack=zds.Ack()).SerializeToString()


class Events(http.client.HTTPConnection):
    """The plugin's way to the agent."""

    def __init__(self, path):
        super().__init__("agent", timeout=support.PATIENCE)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Node:
    """A node with a real agent."""

    def __init__(self, mode):
        self.netns = Netns()
        self.place = support.directory()
        self.socket = os.path.join(self.place, "zds.sock")
        settings = {
            "AMBIDEX_RUN_DIR": self.place,
            "AMBIDEX_STATE_DIR": os.path.join(self.place, "state"),
            "ZTUNNEL_UDS_ADDRESS": self.socket,
        }
        self.program = Program(self.netns, ["agent", "--mode", mode], settings)
        eventually("the agent listens", lambda: os.path.exists(self.socket))
        eventually("and for the plugin", lambda: os.path.exists(os.path.join(self.place, "pluginevent.sock")))

    def event(self, what, pod):
        """Status and text of the agent's answer."""
        connection = Events(os.path.join(self.place, "pluginevent.sock"))
        address = {"IP": pod.ip, "Mask": base64.b64encode(b"\xff" * 4).decode()}
        body = {
            "Netns": pod.netns.path,
            "PodName": pod.name,
            "PodNamespace": "alpha",
            "PodUID": f"uid-{pod.name}",
            "ServiceAccount": "web",
            "ContainerID": f"sandbox-{pod.name}",
            "IPs": [{"Interface": 0, "Address": address, "Gateway": None}],
        }
        connection.request("POST", what, json.dumps(body))
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    def page(self, path):
        """Status of a page of the agent's API."""
        connection = Events(os.path.join(self.place, "agent.sock"))
        connection.request("GET", path)
        return connection.getresponse().status

    def adding(self, pod):
        """The same while somebody answers for the proxy."""
        return Waiting(lambda: self.event("/cmdadd", pod))

    def deleting(self, pod):
        return Waiting(lambda: self.event("/cmddel", pod))


class Waiting:
    """A call on its way."""

    def __init__(self, call):
        self.result = None
        self.thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self.thread.start()

    def _run(self, call):
        self.result = call()

    def done(self):
        self.thread.join(support.PATIENCE)
        assert self.result is not None, "no answer from the agent"
        return self.result


class Pod:
    """A pod's namespace, with its address."""

    def __init__(self, node, name, ip):
        self.name, self.ip, self.netns = name, ip, Netns()
        peer = ["peer", "name", "eth0", "netns", str(self.netns.holder.pid)]
        node.netns.run("ip", "link", "add", f"v{name}", "type", "veth", *peer)
        node.netns.run("ip", "link", "set", f"v{name}", "up")
        node.netns.run("ip", "route", "add", f"{ip}/32", "dev", f"v{name}")
        self.netns.run("ip", "addr", "add", f"{ip}/32", "dev", "eth0")
        self.netns.run("ip", "link", "set", "eth0", "up")

    def captured(self):
        return "REDIRECT" in self.netns.run("iptables-save")


class Proxy:
    """A connection on which requests come."""

    def __init__(self, node, hello=HELLO):
        self.packets = eventually("the agent accepts", lambda: connect(node.socket))
        if hello is not None:
            self.packets.send(hello)

    def request(self, kind):
        """The next request, which must be of a kind, and its descriptors."""
        data, fds = self.packets.receive()
        assert data, f"the connection ended instead of {kind}"
        request = zds.WorkloadRequest.FromString(data)
        assert request.WhichOneof("payload") == kind, (kind, request)
        return getattr(request, kind), fds, data

    def plain(self, kind):
        """The same from an agent that must not use what the field's proxies do not know."""
        request, fds, data = self.request(kind)
        wrapped = zds.WorkloadRequest(**{kind: request})
        assert wrapped.SerializeToString(deterministic=True) == data, data.hex()
        if kind == "add":
            assert not request.capture_mode and not request.addresses, request
        if kind == "del":
            assert not request.HasField("drain_millis"), request
        return request, fds

    def add(self, pod):
        """An announcement of a pod, with its namespace."""
        request, fds = self.plain("add")
        info = request.workload_info
        found = (request.uid, info.name, info.namespace, info.service_account)
        assert found == (f"uid-{pod.name}", pod.name, "alpha", "web"), request
        assert [os.fstat(fd).st_ino for fd in fds] == [pod.netns.inode], "the pod's own namespace"
        os.close(fds[0])

    def ack(self, error=""):
        self.packets.send(zds.WorkloadResponse(ack=zds.Ack(error=error)).SerializeToString())

    def snapshot(self, *pods):
        """Takes the snapshot: these pods, in any order."""
        left = {f"uid-{pod.name}": pod for pod in pods}
        while left:
            request, fds = self.plain("add")
            pod = left.pop(request.uid)
            assert [os.fstat(fd).st_ino for fd in fds] == [pod.netns.inode]
            os.close(fds[0])
            self.ack()
        assert self.plain("snapshot_sent")[1] == []
        self.ack()
        return self


def inpod():
    """A proxy of the field: snapshot, live changes, refusals, two proxies at a time."""
    node = Node("inpod")
    one, two = Pod(node, "one", "10.7.0.1"), Pod(node, "two", "10.7.0.2")
    status, why = node.event("/cmdadd", one)
    assert status != 200 and "proxy" in why, (status, why)
    proxy = Proxy(node)
    proxy.snapshot()
    adding = node.adding(one)
    proxy.add(one)
    assert not one.captured(), "captured before the proxy serves it"
    proxy.ack()
    assert adding.done()[0] == 200, adding.result
    assert one.captured()

    # What the proxy refuses is not captured, and the reason reaches the runtime.
    adding = node.adding(two)
    proxy.add(two)
    proxy.ack("no room in the inn")
    status, why = adding.done()
    assert status == 500 and "no room in the inn" in why, (status, why)
    assert not two.captured()
    # It takes back what it announced.
    assert proxy.plain("del")[0].uid == "uid-two"
    proxy.ack()

    # A second proxy gets the snapshot, and live additions; a deletion goes to both.
    second = Proxy(node, zds.ZdsHello(version=7).SerializeToString()).snapshot(one)
    adding = node.adding(two)
    second.add(two)
    second.ack()
    assert adding.done()[0] == 200, adding.result
    deleting = node.deleting(two)
    for end in (proxy, second):
        assert end.plain("del")[0].uid == "uid-two"
        end.ack()
    assert deleting.done()[0] == 200, deleting.result
    assert not two.captured()
    # The second goes: the first gets the live ones again.
    second.packets.close()
    eventually("the first proxy alone", lambda: "proxy disconnected" in node.program.text())
    adding = node.adding(two)
    proxy.add(two)
    proxy.ack()
    assert adding.done()[0] == 200, adding.result
    # All gone: captured pods stay captured, and a new proxy hears of them.
    proxy.packets.close()
    assert one.captured() and two.captured()
    Proxy(node).snapshot(one, two)


def misbehaviour():
    """Proxies that say what no proxy says: they lose their connection, and pods nothing."""
    node = Node("inpod")
    pod = Pod(node, "one", "10.7.0.1")
    proxy = Proxy(node).snapshot()
    adding = node.adding(pod)
    proxy.add(pod)
    proxy.ack()
    assert adding.done()[0] == 200
    proxy.packets.close()

    with open("/proc/self/ns/net") as file:
        hellos = [
            ("no hello", b"\xff\xff\xff", ()),
            ("longer than a packet may be", zds.ZdsHello(version=1).SerializeToString() + b"\xfa\x07\xff\x7f" + b"x" * 1100, ()),
            ("a hello with a descriptor", HELLO, (file.fileno(),)),
        ]
        for what, data, fds in hellos:
            stranger = Proxy(node, hello=None)
            stranger.packets.send(data, fds)
            assert stranger.packets.ended(), what
        # Field 5 (a number), field 2000 (a text) and the version in three bytes.
        later = b"\x28\x07" + b"\x82\x7d\x02hi" + b"\x08\x81\x80\x00"
        answers = [
            ("no message", b"\xff\xff", ()),
            ("an answer of an unknown type", b"\x12\x00", ()),
            ("nothing but unknown fields", b"\x28\x01", ()),
            ("a namespace that nobody asked for", ACK, (file.fileno(),)),
            ("a request", zds.WorkloadRequest(snapshot_sent=zds.SnapshotSent()).SerializeToString(), ()),
            ("an answer of the extension", zds.WorkloadResponse(netns=zds.NetnsReply()).SerializeToString(), ()),
        ]
        for what, data, fds in answers:
            proxy = Proxy(node, later)
            proxy.add(pod)
            proxy.packets.send(data, fds)
            assert proxy.packets.ended(), what
            assert pod.captured(), what
            proxy.packets.close()
    # Fields of the future in an answer mean nothing.
    proxy = Proxy(node)
    proxy.add(pod)
    proxy.packets.send(b"\x28\x01" + ACK + b"\x82\x7d\x02hi")
    assert proxy.plain("snapshot_sent")[1] == []
    proxy.ack()
    # Two answers to one question.
    other = Pod(node, "two", "10.7.0.2")
    proxy.packets.send(ACK)
    assert proxy.packets.ended(), "an answer to nothing"
    proxy = Proxy(node).snapshot(pod)
    adding = node.adding(other)
    proxy.add(other)
    proxy.ack()
    assert adding.done()[0] == 200
    assert node.program.alive()


def node_capture():
    """The extension, by its numbers: the node is set up for the proxy's namespace, and pods come without one."""
    node = Node("node")
    node.netns.run("ip", "addr", "add", "10.7.0.254/32", "dev", "lo")
    place, pod = Pod(node, "proxy", "10.7.0.100"), Pod(node, "one", "10.7.0.1")
    for wired in (place, pod):
        wired.netns.run("ip", "route", "add", "10.7.0.254/32", "dev", "eth0")
        wired.netns.run("ip", "route", "add", "default", "via", "10.7.0.254", "dev", "eth0")
    # A proxy of the field cannot serve pods of the node: the operator is told why.
    assert Proxy(node).packets.ended()
    eventually("said why", lambda: "does not speak the extension" in node.program.text())

    proxy = Proxy(node, zds.ZdsHello(version=zds.V1, extension_version=1).SerializeToString())
    assert proxy.request("get_netns")[1] == []
    proxy.packets.send(zds.WorkloadResponse(netns=zds.NetnsReply()).SerializeToString(), [place.netns.fd])
    configured, fds, _ = proxy.request("configure_node")
    assert (configured.flow, configured.same_node, fds) == ("hybrid", "hbone", []), configured
    local = [str(ipaddress.ip_address(address)) for address in configured.node_addresses]
    assert "10.7.0.254" in local, local
    proxy.ack()
    proxy.snapshot()
    eventually("the node is set up", lambda: "TPROXY" in place.netns.run("iptables-save"))
    eventually("and says so", lambda: node.page("/healthz") == 200)
    adding = node.adding(pod)
    request, fds, _ = proxy.request("add")
    assert fds == [] and request.capture_mode == 1, request
    assert list(request.addresses) == [ipaddress.ip_address(pod.ip).packed]
    assert pod.ip not in members(node)
    proxy.ack()
    assert adding.done()[0] == 200, adding.result
    assert pod.ip in members(node)
    deleting = node.deleting(pod)
    deleted = proxy.request("del")[0]
    assert deleted.uid == "uid-one" and deleted.HasField("drain_millis"), deleted
    assert pod.ip not in members(node), "not captured any more before the proxy forgets it"
    proxy.ack()
    assert deleting.done()[0] == 200, deleting.result


def members(node):
    """Captured addresses."""
    return node.netns.run("ipset", "save")


main({case.__name__: case for case in (inpod, misbehaviour, node_capture)})
