"""A control plane on grpc's own code: delta discovery and certificates."""

import itertools
import queue
import threading
from concurrent import futures

import support

support.require("google.protobuf", "grpc", "cryptography")
discovery, workload, authorization, ca = support.messages("discovery", "workload", "authorization", "ca")

import grpc

ADDRESS = "type.googleapis.com/istio.workload.Address"
POLICY = "type.googleapis.com/istio.security.Authorization"
TYPES = (ADDRESS, POLICY)


class Stream:
    """One discovery stream: what it said, and what it was sent."""

    def __init__(self, metadata):
        self.metadata = metadata
        self.requests = []
        self.outgoing = queue.Queue()
        self.wildcard = set()
        self.names = {type_url: set() for type_url in TYPES}
        # Versions that the client holds, as far as the server knows.
        self.held = {type_url: {} for type_url in TYPES}
        self.nonces = {}

    def first(self, type_url):
        return next((request for request in self.requests if request.type_url == type_url), None)

    def answer_to(self, nonce):
        return next((request for request in self.requests if request.response_nonce == nonce), None)


class ControlPlane:
    """Serves what it is given, to whoever follows it."""

    def __init__(self, authority):
        self.authority = authority
        self.lock = threading.RLock()
        self.resources = {type_url: {} for type_url in TYPES}
        self.streams = []
        self.certificates = []
        # Called with each request for a certificate; what it returns takes the place of the usual answer.
        self.instead = None
        self.counter = itertools.count(1)
        self.server = None

    # What is served.

    def put(self, type_url, name, message):
        """A resource, as a message or as bytes that may be none."""
        content = message if isinstance(message, bytes) else message.SerializeToString()
        with self.lock:
            known = self.resources[type_url].get(name)
            if known and known[1] == content:
                return
            self.resources[type_url][name] = (f"v{next(self.counter)}", content)
            self.push()

    def remove(self, type_url, name):
        with self.lock:
            del self.resources[type_url][name]
            self.push()

    def replace(self, resources):
        """All resources, by type and name."""
        with self.lock:
            for type_url in TYPES:
                for name in set(self.resources[type_url]) - set(resources[type_url]):
                    del self.resources[type_url][name]
                for name, message in resources[type_url].items():
                    content = message.SerializeToString(deterministic=True)
                    known = self.resources[type_url].get(name)
                    if not known or known[1] != content:
                        self.resources[type_url][name] = (f"v{next(self.counter)}", content)
            self.push()

    def push(self):
        """Sends every stream what it follows and does not have."""
        for stream in self.streams:
            for type_url in TYPES:
                if stream.first(type_url):
                    self.send(stream, type_url)

    def find(self, type_url, asked):
        """The name of the resource that an asked name stands for: its own, or an address of it."""
        if asked in self.resources[type_url]:
            return asked
        for name, (_, content) in self.resources[type_url].items():
            if asked in aliases(content):
                return name
        return None

    def send(self, stream, type_url, asked=(), always=False):
        """A response with all differences; names that were just asked for get an answer even if there is no such thing."""
        served, held = self.resources[type_url], stream.held[type_url]
        wanted = set(served) if type_url in stream.wildcard else set()
        removed = set()
        for name in stream.names[type_url]:
            found = self.find(type_url, name)
            if found:
                wanted.add(found)
            elif name in asked:
                removed.add(name)
        removed |= {name for name in held if name not in served}
        fresh = [name for name in sorted(wanted) if held.get(name) != served[name][0] or name in asked]
        if not fresh and not removed and not always:
            return None
        response = discovery.DeltaDiscoveryResponse(type_url=type_url, nonce=f"n{next(self.counter)}")
        for name in fresh:
            version, content = served[name]
            resource = response.resources.add(name=name, version=version)
            resource.aliases.extend(aliases(content) if type_url == ADDRESS else ())
            resource.resource.type_url = type_url
            resource.resource.value = content
            held[name] = version
        for name in removed:
            held.pop(name, None)
        response.removed_resources.extend(sorted(removed))
        stream.nonces[response.nonce] = response
        stream.outgoing.put(response)
        return response.nonce

    # The calls.

    def take(self, stream, request):
        with self.lock:
            type_url = request.type_url
            first = stream.first(type_url) is None
            stream.requests.append(request)
            if type_url not in TYPES or request.response_nonce:
                return
            subscribe, drop = set(request.resource_names_subscribe), set(request.resource_names_unsubscribe)
            if first:
                stream.held[type_url] = dict(request.initial_resource_versions)
                if not subscribe or "*" in subscribe - drop:
                    stream.wildcard.add(type_url)
            names = subscribe - {"*"}
            stream.names[type_url] |= names
            stream.names[type_url] -= drop
            if first or names:
                self.send(stream, type_url, asked=names, always=first and not drop)

    def delta(self, requests, context):
        stream = Stream(dict(context.invocation_metadata()))
        with self.lock:
            self.streams.append(stream)

        def read():
            try:
                for request in requests:
                    self.take(stream, request)
            except grpc.RpcError:
                pass
            stream.outgoing.put(None)

        context.add_callback(lambda: stream.outgoing.put(None))
        threading.Thread(target=read, daemon=True).start()
        while (response := stream.outgoing.get()) is not None:
            yield response
        with self.lock:
            if stream in self.streams:
                self.streams.remove(stream)

    def create(self, request, context):
        with self.lock:
            self.certificates.append((request, dict(context.invocation_metadata())))
        if self.instead:
            return self.instead(request, context)
        return self.issue(request)

    def issue(self, request):
        asked = request.metadata.fields["ImpersonatedIdentity"].string_value
        assert asked == self.authority.identity(request.csr), "another identity than in the request"
        leaf = self.authority.sign(request.csr, request.validity_duration)
        return ca.IstioCertificateResponse(cert_chain=[leaf, self.authority.root_pem()])

    # The server.

    def start(self, address, port=0, encrypted=True):
        """Serves at an address of the current namespace, and returns the port."""
        self.server = grpc.server(futures.ThreadPoolExecutor(32), options=[("grpc.so_reuseport", 0)])
        delta = grpc.stream_stream_rpc_method_handler(
            self.delta,
            request_deserializer=discovery.DeltaDiscoveryRequest.FromString,
            response_serializer=discovery.DeltaDiscoveryResponse.SerializeToString,
        )
        create = grpc.unary_unary_rpc_method_handler(
            self.create,
            request_deserializer=ca.IstioCertificateRequest.FromString,
            response_serializer=ca.IstioCertificateResponse.SerializeToString,
        )
        services = {
            "envoy.service.discovery.v3.AggregatedDiscoveryService": {"DeltaAggregatedResources": delta},
            "istio.v1.auth.IstioCertificateService": {"CreateCertificate": create},
        }
        for name, methods in services.items():
            self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))
        place = f"{address}:{port}"
        if encrypted:
            pair = self.authority.server(address)
            port = self.server.add_secure_port(place, grpc.ssl_server_credentials([pair]))
        else:
            port = self.server.add_insecure_port(place)
        assert port, f"nothing can listen on {place}"
        self.server.start()
        return port

    def stop(self):
        """Ends all streams, and what listens."""
        with self.lock:
            for stream in self.streams:
                stream.outgoing.put(None)
        self.server.stop(0).wait()


def aliases(content):
    """Addresses under which a workload or service can be asked for: `network/ip`."""
    import ipaddress

    try:
        message = workload.Address.FromString(content)
    except Exception:
        return []
    if message.HasField("workload"):
        pairs = [(message.workload.network, address) for address in message.workload.addresses]
    else:
        pairs = [(address.network, address.address) for address in message.service.addresses]
    return [f"{network}/{ipaddress.ip_address(ip)}" for network, ip in pairs if len(ip) in (4, 16)]
