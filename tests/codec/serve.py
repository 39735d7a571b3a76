"""`ambidex control`'s place taken: the mesh of a directory in LOCAL_XDS form, served by the codec's control plane.

    serve.py control --dir MESH --ca-dir CA --listen ADDRESS:PORT
"""

import ipaddress
import os
import sys
import time

import yaml

from authority import Authority
from plane import ADDRESS, POLICY, ControlPlane, authorization, workload

POLL = 0.2


def options(arguments):
    """Flags and their values."""
    assert arguments[0] == "control", arguments
    return dict(zip(arguments[1::2], arguments[2::2]))


def network_address(message, text):
    network, _, ip = text.partition("/")
    message.network, message.address = network, ipaddress.ip_address(ip).packed


def gateway(message, found):
    head, _, tail = found["destination"].partition("/")
    try:
        ipaddress.ip_address(tail)
        network_address(message.address, found["destination"])
    except ValueError:
        message.hostname.namespace, message.hostname.hostname = head, tail
    message.hbone_mtls_port = found.get("hboneMtlsPort", 15008)


def workload_of(found):
    made = workload.Workload()
    same = dict(uid="uid", name="name", namespace="namespace", serviceAccount="service_account", node="node")
    same |= dict(network="network", clusterId="cluster_id", hostname="hostname", trustDomain="trust_domain")
    same |= dict(nativeTunnel="native_tunnel")
    for key, field in same.items():
        if key in found:
            setattr(made, field, found[key])
    made.addresses.extend(ipaddress.ip_address(ip).packed for ip in found["workloadIps"])
    made.tunnel_protocol = {"HBONE": workload.HBONE, "TCP": workload.NONE}[found.get("protocol", "TCP")]
    made.status = workload.WorkloadStatus.Value(found.get("status", "Healthy").upper())
    made.authorization_policies.extend(found.get("authorizationPolicies", []))
    for key, ports in found["services"].items():
        made.services[key].SetInParent()
        for port, target in ports.items():
            made.services[key].ports.add(service_port=int(port), target_port=int(target))
    if found.get("waypoint"):
        gateway(made.waypoint, found["waypoint"])
    return made


def service_of(found):
    made = workload.Service(name=found["name"], namespace=found["namespace"], hostname=found["hostname"])
    for vip in found["vips"]:
        network_address(made.addresses.add(), vip)
    for port, target in found["ports"].items():
        made.ports.add(service_port=int(port), target_port=int(target))
    return made


TEXTS = dict(namespaces="namespaces", principals="principals")
NETWORKS = dict(sourceIps="source_ips", destinationIps="destination_ips")


def policy_of(found):
    scope = {"Global": authorization.GLOBAL, "Namespace": authorization.NAMESPACE}
    scope = scope.get(found["scope"], authorization.WORKLOAD_SELECTOR)
    action = {"Allow": authorization.ALLOW, "Deny": authorization.DENY}[found["action"]]
    made = authorization.Authorization(name=found["name"], namespace=found["namespace"], scope=scope, action=action)
    made.dry_run = found["dryRun"]
    for rule in found["rules"]:
        clauses = made.rules.add().clauses
        for clause in rule:
            matches = clauses.add().matches
            for match in clause:
                match_of(matches.add(), match)
    return made


def match_of(made, found):
    for key, values in found.items():
        negated = key.startswith("not")
        plain = key[3].lower() + key[4:] if negated else key
        field = lambda name: getattr(made, ("not_" if negated else "") + name)  # noqa: E731
        for value in values:
            if plain in TEXTS:
                ((kind, text),) = value.items()
                if kind == "Presence":
                    field(TEXTS[plain]).add().presence.SetInParent()
                else:
                    field(TEXTS[plain]).add(**{kind.lower(): text})
            elif plain in NETWORKS:
                network = ipaddress.ip_network(value)
                field(NETWORKS[plain]).add(address=network.network_address.packed, length=network.prefixlen)
            elif plain == "destinationPorts":
                field("destination_ports").append(value)
            elif plain == "serviceAccounts":
                account = dict(namespace=value["namespace"], service_account=value["serviceAccount"])
                field("service_accounts").add(**account)
            else:
                raise ValueError(key)


def mesh(directory):
    """All resources in a directory's files."""
    resources = {ADDRESS: {}, POLICY: {}}
    for name in sorted(os.listdir(directory)):
        if name.startswith(".") or not name.endswith((".yaml", ".yml")):
            continue
        with open(os.path.join(directory, name)) as file:
            document = yaml.safe_load(file) or {}
        for found in document.get("workloads") or []:
            resources[ADDRESS][found["uid"]] = workload.Address(workload=workload_of(found))
        for found in document.get("services") or []:
            key = f"{found['namespace']}/{found['hostname']}"
            resources[ADDRESS][key] = workload.Address(service=service_of(found))
        for found in document.get("policies") or []:
            resources[POLICY][f"{found['namespace']}/{found['name']}"] = policy_of(found)
    return resources


def main():
    given = options(sys.argv[1:])
    plane = ControlPlane(Authority(given["--ca-dir"]))
    plane.replace(mesh(given["--dir"]))
    address, _, port = given["--listen"].rpartition(":")
    plane.start(address, int(port))
    print("control plane started", flush=True)
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(POLL)
        plane.replace(mesh(given["--dir"]))


main()
