"""Plays the control plane and the CA for a real proxy."""

import ipaddress
import json
import os
import socket

import support
from plane import ADDRESS, POLICY, ControlPlane, authorization, ca, workload
from seqpacket import Packets, listen
from support import Netns, Program, eventually, main, page

(zds,) = support.messages("zds")
from authority import Authority  # noqa: E402

import grpc  # noqa: E402


def pod(name, ip, **more):
    made = workload.Workload(uid=f"c//Pod/alpha/{name}", name=name, namespace="alpha", service_account=name)
    made.addresses.append(ipaddress.ip_address(ip).packed)
    made.tunnel_protocol = workload.HBONE
    for field, value in more.items():
        setattr(made, field, value)
    return workload.Address(workload=made)


def uid(name):
    return f"c//Pod/alpha/{name}"


def service(ip):
    made = workload.Service(name="web", namespace="alpha", hostname="web.alpha.svc.cluster.local")
    made.addresses.add(address=ipaddress.ip_address(ip).packed)
    made.ports.add(service_port=80, target_port=8080)
    return workload.Address(service=made)


def policy(name):
    made = authorization.Authorization(name=name, namespace="alpha", action=authorization.DENY)
    match = made.rules.add().clauses.add().matches.add()
    match.principals.add(suffix="/sa/nobody")
    match.not_namespaces.add().presence.SetInParent()
    match.source_ips.add(address=bytes([10, 0, 0, 0]), length=8)
    match.not_destination_ports.append(443)
    return made


SERVICE = "alpha/web.alpha.svc.cluster.local"


class Followed:
    """A control plane, a proxy that follows it, and the proxy's agent, all in one namespace."""

    def __init__(self, encrypted=True, **environment):
        self.netns = Netns()
        Netns.enter(self.netns.fd)
        self.authority = Authority()
        self.plane = ControlPlane(self.authority)
        self.plane.put(ADDRESS, uid("a"), pod("a", "10.0.0.1"))
        self.plane.put(ADDRESS, uid("b"), pod("b", "10.0.0.2"))
        self.plane.put(ADDRESS, SERVICE, service("10.96.0.1"))
        self.plane.put(POLICY, "alpha/deny", policy("deny"))
        self.encrypted = encrypted
        self.port = self.plane.start("127.0.0.1", encrypted=encrypted)
        place = support.directory()
        self.listener = listen(os.path.join(place, "zds.sock"))
        token = os.path.join(place, "token")
        with open(token, "w") as file:
            file.write("the-token")
        settings = {
            "AMBIDEX_RUN_DIR": place,
            "INPOD_UDS": os.path.join(place, "zds.sock"),
            "XDS_ADDRESS": f"{'https' if encrypted else 'http'}://127.0.0.1:{self.port}",
            "XDS_ROOT_CA": self.authority.root_file,
            "CA_ROOT_CA": self.authority.root_file,
            "AUTH_TOKEN": token,
            "CLUSTER_ID": "c1",
            "NODE_NAME": "node-1",
            "POD_NAME": "proxy-x",
            "POD_NAMESPACE": "system",
            "INSTANCE_IP": "10.9.9.9",
            "ISTIO_META_COLOUR": "blue",
            "XDS_HEADER_ROOM": "12",
            "SECRET_TTL": "1h",
        }
        self.program = Program(self.netns, ["proxy"], {**settings, **environment})

    def stream(self):
        """The proxy's stream, once it has asked for both types."""

        def asked():
            for stream in self.plane.streams:
                if stream.first(ADDRESS) and stream.first(POLICY):
                    return stream
            return None

        return eventually("the proxy follows", asked)

    def dump(self):
        return json.loads(page(self.netns, 15000, "/config_dump")[1])

    def names(self, what="workloads"):
        return {found["name"] for found in self.dump()[what]}

    def agent(self):
        packets = Packets(self.listener.accept()[0])
        packets.receive()
        return packets


def acknowledged(stream, nonce, why=None):
    """The answer to a response: an acknowledgement, or a refusal that says why."""
    answer = eventually(f"an answer to {nonce}", lambda: stream.answer_to(nonce))
    assert answer.type_url == stream.nonces[nonce].type_url
    assert answer.HasField("error_detail") == (why is not None), answer
    if why is not None:
        assert answer.error_detail.code == 3 and why in answer.error_detail.message, answer
    return answer


def last(stream, type_url):
    return [nonce for nonce, response in stream.nonces.items() if response.type_url == type_url][-1]


def wildcard(encrypted=True):
    """All of the mesh: who asks, with what, and what each response is answered with."""
    followed = Followed(encrypted)
    plane, stream = followed.plane, followed.stream()
    for type_url in (ADDRESS, POLICY):
        first = stream.first(type_url)
        assert not first.resource_names_subscribe and not first.resource_names_unsubscribe, first
        assert not first.initial_resource_versions and not first.response_nonce, first
        assert first.node.id == "ztunnel~10.9.9.9~proxy-x.system~system.svc.cluster.local", first.node.id
        said = {name: value.string_value for name, value in first.node.metadata.fields.items()}
        assert said["NAME"] == "proxy-x" and said["NAMESPACE"] == "system" and said["NODE_NAME"] == "node-1", said
        assert said["INSTANCE_IPS"] == "10.9.9.9" and said["COLOUR"] == "blue", said
        acknowledged(stream, last(stream, type_url))
    assert stream.metadata["clusterid"] == "c1" and stream.metadata["room"] == "12", stream.metadata
    # What proves who asks never travels in the clear.
    assert stream.metadata.get("authorization") == ("Bearer the-token" if encrypted else None), stream.metadata
    eventually("the mesh has arrived", lambda: followed.names() == {"a", "b"})
    assert followed.names("services") == {"web"} and followed.names("policies") == {"deny"}

    # A change and a removal.
    plane.put(ADDRESS, uid("c"), pod("c", "10.0.0.3"))
    acknowledged(stream, last(stream, ADDRESS))
    assert followed.names() == {"a", "b", "c"}
    plane.remove(ADDRESS, uid("b"))
    plane.remove(POLICY, "alpha/deny")
    acknowledged(stream, last(stream, ADDRESS))
    acknowledged(stream, last(stream, POLICY))
    assert followed.names() == {"a", "c"} and followed.names("policies") == set()


def plaintext():
    """The same without TLS."""
    wildcard(encrypted=False)


def refusal():
    """One bad resource among good ones: named in the refusal, and alone in not being taken."""
    followed = Followed()
    plane, stream = followed.plane, followed.stream()
    eventually("the mesh has arrived", lambda: followed.names() == {"a", "b"})
    nobody = pod("x", "10.0.0.9")
    nobody.workload.addresses[0] = b"\x01\x02\x03"
    unknown = workload.Address.FromString(pod("y", "10.0.0.8").SerializeToString())
    unknown.workload.tunnel_protocol = 2
    rows = [
        ("not a message", b"\xff\xff\xff", "bad-1"),
        ("an address of three bytes", nobody, "3 bytes"),
        ("a tunnel that nobody speaks", unknown, "bad-3"),
        ("neither workload nor service", b"", "bad-4"),
    ]
    for number, (what, content, word) in enumerate(rows, 1):
        with plane.lock:
            good = f"good-{number}"
            # Both in one response.
            plane.resources[ADDRESS][uid(good)] = (f"g{number}", pod(good, f"10.0.1.{number}").SerializeToString())
            plane.put(ADDRESS, f"bad-{number}", content)
        refused = acknowledged(stream, last(stream, ADDRESS), why=word)
        assert f"bad-{number}" in refused.error_detail.message, what
        assert good not in refused.error_detail.message, what
        assert good in followed.names(), what
    # A resource that was good stays as it was.
    broken = pod("a", "10.0.0.1")
    broken.workload.addresses[0] = b""
    plane.put(ADDRESS, uid("a"), broken)
    acknowledged(stream, last(stream, ADDRESS), why=uid("a"))
    assert "a" in followed.names()
    plane.put(ADDRESS, uid("a"), pod("a", "10.0.0.7"))
    acknowledged(stream, last(stream, ADDRESS))
    assert "10.0.0.7" in page(followed.netns, 15000, "/config_dump")[1]
    # Fields of the future, in another order: nothing to refuse.
    later = b"\xfa\x7d\x02hi" + pod("later", "10.0.2.1").SerializeToString() + b"\xf0\x7d\x01"
    plane.put(ADDRESS, uid("later"), later)
    acknowledged(stream, last(stream, ADDRESS))
    assert "later" in followed.names()
    assert stream in plane.streams, "the stream goes on"


def reconnection():
    """A new stream begins with the versions of what is held; what goes meanwhile is removed, and nothing is sent twice."""
    followed = Followed()
    plane, stream = followed.plane, followed.stream()
    eventually("the mesh has arrived", lambda: followed.names() == {"a", "b"})
    held = {name: version for name, (version, _) in plane.resources[ADDRESS].items()}
    plane.stop()
    assert followed.names() == {"a", "b"}, "what is known is kept"
    plane.streams.clear()
    with plane.lock:
        del plane.resources[ADDRESS][uid("b")]
        plane.resources[ADDRESS][uid("c")] = ("c1", pod("c", "10.0.0.3").SerializeToString())
    eventually("the same port", lambda: plane.start("127.0.0.1", followed.port))
    again = followed.stream()
    assert again is not stream
    assert dict(again.first(ADDRESS).initial_resource_versions) == held
    assert set(again.first(POLICY).initial_resource_versions) == {"alpha/deny"}
    assert again.first(ADDRESS).HasField("node")
    eventually("the difference has arrived", lambda: followed.names() == {"a", "c"})
    response = again.nonces[last(again, ADDRESS)]
    assert [resource.name for resource in response.resources] == [uid("c")], response
    assert list(response.removed_resources) == [uid("b")]
    acknowledged(again, last(again, ADDRESS))
    assert followed.names("services") == {"web"}


def dial(netns, address):
    """Connects from a pod, and reads to the end of whatever comes of it."""
    connection = netns.socket(socket.AF_INET, socket.SOCK_STREAM)
    connection.settimeout(support.PATIENCE)
    with connection:
        try:
            connection.connect(address)
            connection.recv(1)
        except ConnectionError:
            pass


def on_demand():
    """Nothing until a connection needs it; then by address, each name once, and dropped when nothing has it."""
    followed = Followed(XDS_ON_DEMAND="true")
    plane, stream, agent = followed.plane, followed.stream(), followed.agent()
    first = stream.first(ADDRESS)
    assert list(first.resource_names_subscribe) == ["*"] and list(first.resource_names_unsubscribe) == ["*"], first
    first = stream.first(POLICY)
    assert not first.resource_names_subscribe and not first.resource_names_unsubscribe, first
    eventually("policies come all", lambda: followed.names("policies") == {"deny"})

    netns = Netns()
    netns.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "other")
    netns.run("ip", "addr", "add", "10.0.0.1/32", "dev", "eth0")
    netns.run("ip", "link", "set", "eth0", "up")
    netns.run("ip", "link", "set", "other", "up")
    netns.run("ip", "route", "add", "default", "dev", "eth0")
    capture = "-t nat -A OUTPUT -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001"
    netns.run("iptables", *capture.split())
    # What the proxy itself sends has no way out, and is told so at once.
    netns.run("iptables", *"-A OUTPUT -p tcp --syn -m mark --mark 0x539/0xfff -j REJECT --reject-with tcp-reset".split())
    info = zds.WorkloadInfo(name="a", namespace="alpha", service_account="a")
    add = zds.AddWorkload(uid="a", workload_info=info)
    agent.send(zds.WorkloadRequest(add=add).SerializeToString(), [netns.fd])
    assert zds.WorkloadResponse.FromString(agent.receive()[0]).ack.error == ""

    def asked():
        names = []
        for request in stream.requests[2:]:
            names.extend(request.resource_names_subscribe)
        return names

    assert not followed.names() & {"b"}
    for _ in range(2):
        dial(netns, ("10.0.0.2", 80))
    assert asked().count("/10.0.0.2") == 1, asked()
    assert "b" in followed.names()
    acknowledged(stream, last(stream, ADDRESS))
    dial(netns, ("10.96.0.1", 80))
    assert asked().count("/10.96.0.1") == 1 and followed.names("services") == {"web"}, asked()
    # What nothing has is asked for and not followed.
    dial(netns, ("10.0.0.77", 80))
    assert "/10.0.0.77" in asked()
    dropped = lambda: any("/10.0.0.77" in r.resource_names_unsubscribe for r in stream.requests)  # noqa: E731
    eventually("the name is dropped", dropped)
    # What is followed changes, and goes.
    plane.put(ADDRESS, uid("b"), pod("b", "10.0.0.2", node="node-9"))
    acknowledged(stream, last(stream, ADDRESS))
    assert "node-9" in page(followed.netns, 15000, "/config_dump")[1]
    plane.remove(ADDRESS, uid("b"))
    acknowledged(stream, last(stream, ADDRESS))
    assert "b" not in followed.names()
    # A new stream asks for what was asked for, and for no more.
    plane.stop()
    plane.streams.clear()
    eventually("the same port", lambda: plane.start("127.0.0.1", followed.port))
    first = followed.stream().first(ADDRESS)
    assert "*" in first.resource_names_unsubscribe and "/10.96.0.1" in first.resource_names_subscribe, first
    assert "/10.0.0.77" not in first.resource_names_subscribe, first
    assert SERVICE in first.initial_resource_versions, first


def certificates():
    """What is asked of the CA, and what becomes of each answer."""
    followed = Followed()
    plane, agent = followed.plane, followed.agent()
    followed.stream()
    asked = []

    def answers(make):
        asked.clear()

        def instead(request, context):
            asked.append(request)
            return make(request, context)

        plane.instead = instead

    def add(name, netns):
        info = zds.WorkloadInfo(name=name, namespace="alpha", service_account=name)
        add = zds.AddWorkload(uid=name, workload_info=info)
        agent.send(zds.WorkloadRequest(add=add).SerializeToString(), [netns.fd])
        return zds.WorkloadResponse.FromString(agent.receive()[0]).ack.error

    def refused(name, make):
        """The pod is not served: the reason."""
        answers(make)
        netns = Netns()
        error = add(name, netns)
        assert asked, name
        return error

    chain = lambda *pems: ca.IstioCertificateResponse(cert_chain=pems)  # noqa: E731
    sign = lambda request, identity=None: plane.authority.sign(request.csr, request.validity_duration, identity)  # noqa: E731
    root = plane.authority.root_pem()

    # Element by element; in one element; with something behind it that is no certificate.
    good = {
        "elements": lambda request, _: chain(sign(request), root),
        "joined": lambda request, _: chain(sign(request) + root),
        "lines": lambda request, _: chain("\n# leaf\n" + sign(request).replace("\n", "\r\n"), root),
    }
    for name, make in good.items():
        answers(make)
        netns = Netns()
        assert add(name, netns) == "", name
        request = asked[0]
        identity = f"spiffe://cluster.local/ns/alpha/sa/{name}"
        assert plane.authority.identity(request.csr) == identity
        assert request.metadata.fields["ImpersonatedIdentity"].string_value == identity, request
        assert request.validity_duration == 3600, request
        assert {15001, 15006, 15008} <= netns.listening()
        assert identity in page(followed.netns, 15000, "/config_dump")[1], name
    metadata = plane.certificates[0][1]
    assert metadata["authorization"] == "Bearer the-token" and metadata["clusterid"] == "c1", metadata

    def denied(_, context):
        context.abort(grpc.StatusCode.PERMISSION_DENIED, "not your pod")

    stranger = Authority()
    bad = {
        "denied": (denied, "not your pod"),
        "nothing": (lambda request, _: chain(), "0 certificates"),
        "rootless": (lambda request, _: chain(sign(request)), "1 certificates"),
        "garbage": (lambda request, _: chain("hello", "world"), "0 certificates"),
        "another": (lambda request, _: chain(sign(request, "spiffe://cluster.local/ns/alpha/sa/x"), root), "sa/x"),
        "foreign": (lambda request, _: chain(stranger.root_pem(), root), "foreign"),
    }
    for name, (make, word) in bad.items():
        error = refused(name, make)
        assert word in error, f"{name}: {error!r}"
    plane.instead = None
    netns = Netns()
    assert add("after", netns) == ""


main({case.__name__: case for case in (wildcard, plaintext, on_demand, refusal, reconnection, certificates)})
