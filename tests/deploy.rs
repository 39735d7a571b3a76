//! The manifests: the Helm chart and kustomize say the same, what they say this program understands, and they ask for no
//! more than it needs.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod manifests;

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use manifests::{
    Objects, container, containers, helm, kustomized, list, pod, rendered, root, texts, tool,
    written,
};
use serde_json::{Value, json};

/// The manifests that are written down; everything else is a change of these.
const WRITTEN: [&str; 2] = [
    "kustomize/base/ambidex.yaml",
    "kustomize/teardown/ambidex.yaml",
];

/// Says what a test cannot look at on this machine.
fn without(program: &str) {
    println!("{program} is not here (`make deps` fetches it): what it makes is not looked at");
}

/// Every form that the manifests can have on this machine, by name.
fn forms() -> BTreeMap<String, Objects> {
    let mut forms: BTreeMap<String, Objects> = WRITTEN
        .iter()
        .map(|file| (file.to_string(), written(file)))
        .collect();
    match tool("helm") {
        None => without("helm"),
        Some(helm) => {
            let settings = [
                "mode=node",
                "mode=mixed",
                "platform=openshift,mode=node",
                "teardown=true",
            ];
            for setting in settings {
                let more = "platform=gke,agent.env.ZTUNNEL_UDS_ADDRESS=/s,agent.iptables=legacy,agent.hostPID=true,\
                            cni.owned=true,cni.confName=a.conf,proxy.xdsAddress=a:1,proxy.caAddress=b:2,\
                            proxy.env.SECRET_TTL=1h,seLinuxType=t,image.pullSecrets[0].name=s,podAnnotations.a=b,\
                            nodeSelector.a=b";
                for settings in [vec![setting], vec![setting, more]] {
                    let name = format!("helm {settings:?}");
                    forms.insert(name, rendered(&helm, &settings));
                }
            }
        }
    }
    forms
}

#[test]
fn helm_and_kustomize_make_the_same_objects() {
    let (Some(helm), Some(kubectl)) = (tool("helm"), tool("kubectl")) else {
        return without("helm or kubectl");
    };
    for (directory, settings) in [
        ("base", "mode=inpod"),
        ("overlays/inpod", "mode=inpod"),
        ("overlays/node", "mode=node"),
        ("overlays/mixed", "mode=mixed"),
        ("teardown", "mode=mixed,teardown=true"),
    ] {
        let mut by_kustomize = kustomized(&kubectl, directory);
        let namespace = ("Namespace".to_owned(), manifests::NAMESPACE.to_owned());
        // Helm makes it by itself.
        let namespace = by_kustomize.remove(&namespace);
        assert_eq!(namespace.is_some(), directory != "teardown", "{directory}");
        let by_helm = rendered(&helm, &[settings]);
        let keys = |objects: &Objects| objects.keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&by_kustomize), keys(&by_helm), "{directory}");
        for (key, object) in &by_helm {
            assert_eq!(
                unordered(&by_kustomize[key]),
                unordered(object),
                "{directory}: {key:?}; `make manifests` writes what the chart says"
            );
        }
    }
}

/// Lists in which the order says nothing, in one order.
fn unordered(object: &Value) -> Value {
    match object {
        Value::Object(members) => members
            .iter()
            .map(|(key, value)| {
                let mut value = unordered(value);
                if let ("env" | "volumes" | "volumeMounts", Value::Array(list)) =
                    (&**key, &mut value)
                {
                    list.sort_by_key(|entry| entry["name"].to_string());
                }
                (key.clone(), value)
            })
            .collect(),
        Value::Array(list) => list.iter().map(unordered).collect(),
        other => other.clone(),
    }
}

/// Settings that the chart must refuse, as what `--set` takes and as YAML.
const WRONG: [(&str, &str); 8] = [
    ("mode=sidecar", "mode: sidecar"),
    ("mode=none", "mode: none"),
    ("platform=mainframe", "platform: mainframe"),
    ("cni.bindir=/opt", "cni: {bindir: /opt}"),
    ("cni.binDir=opt/cni", "cni: {binDir: opt/cni}"),
    ("agent.verifyEvery=5", "agent: {verifyEvery: 5}"),
    ("agent.healthPort=70000", "agent: {healthPort: 70000}"),
    ("proxy.tokenSeconds=60", "proxy: {tokenSeconds: 60}"),
];

#[test]
fn helm_accepts_the_chart_and_refuses_wrong_values() {
    let Some(program) = tool("helm") else {
        return without("helm");
    };
    let mut lint = Command::new(&program);
    lint.args(["lint", "--strict"])
        .arg(root().join("deploy/helm/ambidex"));
    let linted = lint.output().unwrap();
    assert!(linted.status.success(), "{linted:?}");
    for (setting, _) in WRONG {
        let error = helm(&program, "template", &[setting]).unwrap_err();
        let word = setting.split(['.', '=']).next().unwrap();
        assert!(
            error.contains("schema") && error.contains(word),
            "{setting}: {error}"
        );
    }
}

/// The same without helm.
#[test]
fn the_schema_fits_the_values() {
    let script = "import json, sys, yaml, jsonschema\n\
        schema, values, wrong = json.load(open(sys.argv[1])), yaml.safe_load(open(sys.argv[2])), json.loads(sys.argv[3])\n\
        jsonschema.Draft7Validator.check_schema(schema)\n\
        judge = jsonschema.Draft7Validator(schema)\n\
        assert not list(judge.iter_errors(values)), list(judge.iter_errors(values))\n\
        assert set(values) | {'global'} == set(schema['properties'])\n\
        for part, inner in schema['properties'].items():\n\
        \x20   if 'properties' in inner: assert set(values.get(part, inner['properties'])) == set(inner['properties']), part\n\
        for text in wrong:\n\
        \x20   assert list(judge.iter_errors(yaml.safe_load(text))), text\n\
        print('judged', len(wrong))\n";
    let chart = root().join("deploy/helm/ambidex");
    let wrong: Vec<&str> = WRONG.iter().map(|(_, yaml)| *yaml).collect();
    let output = Command::new("python3")
        .args(["-c", script])
        .arg(chart.join("values.schema.json"))
        .arg(chart.join("values.yaml"))
        .arg(json!(wrong).to_string())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(output.stdout, b"judged 8\n");
}

/// Words of the chart's schema that are words of a flag.
#[test]
fn the_schema_knows_the_words_of_the_flags() {
    let text = std::fs::read(root().join("deploy/helm/ambidex/values.schema.json")).unwrap();
    let schema: Value = serde_json::from_slice(&text).unwrap();
    let command = ambidex::cli::command();
    let agent = command.find_subcommand("agent").unwrap();
    let words = |flag: &str| -> BTreeSet<String> {
        let mut arguments = agent.get_arguments();
        let argument = arguments.find(|a| a.get_long() == Some(flag)).expect(flag);
        let values = argument.get_possible_values();
        values
            .iter()
            .map(|value| value.get_name().to_owned())
            .collect()
    };
    let of_schema = |schema: &Value| -> BTreeSet<String> {
        texts(list(schema, "enum"))
            .into_iter()
            .map(str::to_owned)
            .collect()
    };
    let agent = &schema["properties"]["agent"]["properties"];
    for (key, flag) in [
        ("nodeFlow", "node-flow"),
        ("overlay", "overlay"),
        ("sameNode", "same-node"),
        ("inpodRules", "inpod-rules"),
    ] {
        assert_eq!(of_schema(&agent[key]), words(flag), "{key}");
    }
    let mut modes = words("mode");
    // A cluster without capture has no agents.
    modes.remove("none");
    assert_eq!(of_schema(&schema["properties"]["mode"]), modes);
}

/// Variables that are read where no flag is.
const VARIABLES: [&str; 5] = [
    "RUST_LOG",
    "AMBIDEX_RUN_DIR",
    "AMBIDEX_STATE_DIR",
    "AMBIDEX_IPTABLES",
    "AMBIDEX_PROC_SYS",
];

/// Variables that a command reads, its flags' and those.
fn variables(arguments: &[&str]) -> BTreeSet<String> {
    let program = ambidex::cli::command();
    let mut command = &program;
    for word in arguments {
        match command.find_subcommand(word) {
            Some(inner) => command = inner,
            None => break,
        }
    }
    command
        .get_arguments()
        .filter_map(|argument| Some(argument.get_env()?.to_str()?.to_owned()))
        .chain(VARIABLES.map(str::to_owned))
        .collect()
}

#[test]
fn what_the_manifests_say_is_understood() {
    for (form, objects) in forms() {
        for name in ["ambidex-agent", "ambidex-proxy"] {
            for container in containers(pod(&objects, name)) {
                let arguments = texts(list(container, "args"));
                let line = std::iter::once("ambidex").chain(arguments.iter().copied());
                let parsed = ambidex::cli::command().try_get_matches_from(line);
                assert!(parsed.is_ok(), "{form}: {arguments:?}: {:?}", parsed.err());
                let known = variables(&arguments);
                for variable in list(container, "env") {
                    let name = variable["name"].as_str().unwrap();
                    assert!(
                        known.contains(name),
                        "{form}: {arguments:?} does not read {name}"
                    );
                }
            }
        }
    }
}

/// The value of a flag in a container's arguments.
#[track_caller]
fn flag<'a>(container: &'a Value, name: &str) -> &'a str {
    let arguments = texts(list(container, "args"));
    let mut given = arguments
        .iter()
        .filter_map(|a| a.strip_prefix(name)?.strip_prefix('='));
    given
        .next()
        .unwrap_or_else(|| panic!("no {name} in {arguments:?}"))
}

fn variable<'a>(container: &'a Value, name: &str) -> Option<&'a str> {
    let mut env = list(container, "env").iter().filter(|v| v["name"] == name);
    env.next()?["value"].as_str()
}

fn mounts(container: &Value) -> BTreeSet<&str> {
    let mounts = list(container, "volumeMounts").iter();
    mounts
        .map(|mount| mount["mountPath"].as_str().unwrap())
        .collect()
}

/// Default of a flag of `ambidex proxy`.
fn default_of(name: &str) -> String {
    let command = ambidex::cli::command();
    let mut arguments = command.find_subcommand("proxy").unwrap().get_arguments();
    let argument = arguments.find(|a| a.get_long() == Some(name)).expect(name);
    argument.get_default_values()[0]
        .to_str()
        .unwrap()
        .to_owned()
}

#[test]
fn ports_and_paths_are_those_of_the_program() {
    for (form, objects) in forms() {
        let (of_agent, of_proxy) = (
            pod(&objects, "ambidex-agent"),
            pod(&objects, "ambidex-proxy"),
        );
        let (agent, proxy) = (container(of_agent, "agent"), container(of_proxy, "proxy"));
        let served = |address: &str| address.rsplit(':').next().unwrap().parse::<u64>().unwrap();
        let ports = |container: &Value| -> BTreeMap<String, u64> {
            let ports = list(container, "ports").iter();
            ports
                .map(|p| {
                    (
                        p["name"].as_str().unwrap().to_owned(),
                        p["containerPort"].as_u64().unwrap(),
                    )
                })
                .collect()
        };
        let wanted = [
            ("health".to_owned(), served(flag(agent, "--health"))),
            ("metrics".to_owned(), served(flag(agent, "--metrics"))),
        ];
        assert_eq!(ports(agent), BTreeMap::from(wanted), "{form}");
        let wanted = [
            ("metrics".to_owned(), served(&default_of("metrics"))),
            ("readiness".to_owned(), served(&default_of("readiness"))),
        ];
        assert_eq!(ports(proxy), BTreeMap::from(wanted), "{form}");
        for (name, container) in [("ambidex-agent", agent), ("ambidex-proxy", proxy)] {
            let scraped = &objects[&("DaemonSet".to_owned(), name.to_owned())]["spec"]["template"]
                ["metadata"]["annotations"]["prometheus.io/port"];
            assert_eq!(
                scraped.as_str().unwrap(),
                ports(container)["metrics"].to_string()
            );
            let probe = &container["readinessProbe"]["httpGet"]["port"];
            assert!(
                ports(container).contains_key(probe.as_str().unwrap()),
                "{form}"
            );
        }
        assert!(
            mounts(proxy).contains(variable(proxy, "AMBIDEX_RUN_DIR").unwrap()),
            "{form}"
        );
        // An undo finds what the agent wrote down.
        for name in ["agent", "undo"] {
            let Some(container) = containers(of_agent).find(|c| c["name"] == name) else {
                continue;
            };
            let mounted = mounts(container);
            for said in ["AMBIDEX_RUN_DIR", "AMBIDEX_STATE_DIR"] {
                assert!(
                    mounted.contains(variable(container, said).unwrap()),
                    "{form}: {said}"
                );
            }
            let sysctls = variable(container, "AMBIDEX_PROC_SYS").map(|path| format!("{path}/net"));
            let node = mounted
                .iter()
                .find(|path| path.ends_with("/net"))
                .map(|path| path.to_string());
            assert_eq!(sysctls, node, "{form}");
        }
        for name in ["install-cni", "uninstall"] {
            let Some(container) = containers(of_agent).find(|c| c["name"] == name) else {
                continue;
            };
            for directory in ["--bin-dir", "--conf-dir"] {
                assert!(
                    mounts(container).contains(flag(container, directory)),
                    "{form}"
                );
            }
        }
        // The plugin runs on the node and looks for the socket there.
        if let Some(installer) = containers(of_agent).find(|c| c["name"] == "install-cni") {
            let run = variable(installer, "AMBIDEX_RUN_DIR");
            assert_eq!(run, variable(agent, "AMBIDEX_RUN_DIR"), "{form}");
            let volume = list(of_agent, "volumes")
                .iter()
                .find(|v| v["name"] == "run")
                .unwrap();
            assert_eq!(volume["hostPath"]["path"].as_str(), run, "{form}");
        }
        for path in [default_of("xds-root-ca"), default_of("ca-root-ca")] {
            let directory = path.rsplit_once('/').unwrap().0;
            assert!(mounts(proxy).contains(directory), "{form}: {path}");
        }
    }
    let sources = include_str!("../modes/cli/sources.rs");
    assert!(sources.contains("\"/var/run/secrets/tokens/istio-token\""));
    // Names of pods begin so, and the plugin lets them pass.
    let plugin = include_str!("../modes/cni/config.rs");
    for name in ["ambidex-agent-", "ambidex-proxy-"] {
        assert!(plugin.contains(&format!("\"{name}\"")), "{name}");
    }
}

#[test]
fn every_volume_is_mounted_and_every_mount_has_one() {
    for (form, objects) in forms() {
        for name in ["ambidex-agent", "ambidex-proxy"] {
            let pod = pod(&objects, name);
            let names = |list: &[Value]| -> BTreeSet<String> {
                list.iter()
                    .map(|v| v["name"].as_str().unwrap().to_owned())
                    .collect()
            };
            let volumes = names(list(pod, "volumes"));
            let mounted: BTreeSet<String> = containers(pod)
                .flat_map(|container| names(list(container, "volumeMounts")))
                .collect();
            assert_eq!(volumes, mounted, "{form}: {name}");
        }
    }
}

/// What a container may do: added capabilities, and that nothing else is given.
#[track_caller]
fn capabilities(container: &Value) -> BTreeSet<&str> {
    let security = &container["securityContext"];
    assert_eq!(
        security["capabilities"]["drop"],
        json!(["ALL"]),
        "{container}"
    );
    assert_eq!(security["readOnlyRootFilesystem"], true, "{container}");
    assert!(security.get("privileged").is_none(), "{container}");
    texts(list(&security["capabilities"], "add"))
        .into_iter()
        .collect()
}

#[test]
fn privileges_are_those_that_are_documented() {
    let operations = std::fs::read_to_string(root().join("docs/operations.md")).unwrap();
    let (_, section) = operations
        .split_once("## Privileges")
        .expect("a section about them");
    let section = section.split("\n## ").next().unwrap();
    for (form, objects) in forms() {
        let (of_agent, of_proxy) = (
            pod(&objects, "ambidex-agent"),
            pod(&objects, "ambidex-proxy"),
        );
        for name in ["agent", "undo"] {
            let Some(container) = containers(of_agent).find(|c| c["name"] == name) else {
                continue;
            };
            let wanted = ["NET_ADMIN", "NET_RAW", "SYS_ADMIN", "SYS_PTRACE"];
            assert_eq!(capabilities(container), BTreeSet::from(wanted), "{form}");
        }
        for name in ["install-cni", "uninstall"] {
            let Some(container) = containers(of_agent).find(|c| c["name"] == name) else {
                continue;
            };
            assert_eq!(capabilities(container), BTreeSet::new(), "{form}");
            assert_eq!(
                container["securityContext"]["allowPrivilegeEscalation"],
                false
            );
        }
        let proxy = capabilities(container(of_proxy, "proxy"));
        let mut wanted = BTreeSet::from(["NET_ADMIN", "SYS_ADMIN"]);
        if flag(container(of_agent, "agent"), "--mode") == "node" {
            wanted.remove("SYS_ADMIN");
        }
        assert_eq!(proxy, wanted, "{form}");
        for capability in ["NET_ADMIN", "NET_RAW", "SYS_ADMIN", "SYS_PTRACE"] {
            assert!(section.contains(&format!("`{capability}`")), "{capability}");
        }
        for pod in [of_agent, of_proxy] {
            let profile = &pod["securityContext"]["seccompProfile"]["type"];
            assert_eq!(profile, "RuntimeDefault", "{form}");
            assert!(pod.get("hostIPC").is_none(), "{form}");
        }
        assert!(of_proxy.get("hostNetwork").is_none() && of_proxy.get("hostPID").is_none());
        assert_eq!(of_proxy["automountServiceAccountToken"], false, "{form}");
        assert_eq!(of_agent["hostNetwork"], true, "{form}");
        let by_default = !form.contains("hostPID");
        assert_eq!(of_agent.get("hostPID").is_none(), by_default, "{form}");
        // Who may ask the API server for what.
        let roles: Vec<_> = objects
            .keys()
            .filter(|(kind, _)| kind.ends_with("Role"))
            .collect();
        assert_eq!(roles.len(), 1, "{form}: {roles:?}");
        let rules: BTreeSet<String> = list(&objects[roles[0]], "rules")
            .iter()
            .flat_map(|rule| {
                let groups = texts(list(rule, "apiGroups")).join(",");
                let resources = texts(list(rule, "resources"));
                let verbs = texts(list(rule, "verbs")).join(",");
                resources
                    .into_iter()
                    .map(move |resource| format!("{groups}/{resource}: {verbs}"))
                    .collect::<Vec<_>>()
            })
            .collect();
        let wanted = [
            "/namespaces: get,list,watch",
            "/pods/status: patch",
            "/pods: get,list,watch",
            "events.k8s.io/events: create,patch",
        ];
        assert_eq!(rules, BTreeSet::from(wanted.map(str::to_owned)), "{form}");
    }
}

#[test]
fn platforms_have_their_own_directories() {
    let Some(helm) = tool("helm") else {
        return without("helm");
    };
    let (bin, conf, netns) = ("/opt/cni/bin", "/etc/cni/net.d", "/var/run/netns");
    let k3s = (
        "/var/lib/rancher/k3s/data/cni",
        "/var/lib/rancher/k3s/agent/etc/cni/net.d",
    );
    let snap = "/var/snap/microk8s/current";
    let (snap_bin, snap_conf) = (
        format!("{snap}/opt/cni/bin"),
        format!("{snap}/args/cni-network"),
    );
    for (settings, wanted) in [
        ("platform=", [bin, conf, netns]),
        ("platform=gke", ["/home/kubernetes/bin", conf, netns]),
        ("platform=k3s", [k3s.0, k3s.1, netns]),
        ("platform=k3d", [k3s.0, k3s.1, netns]),
        ("platform=microk8s", [&snap_bin, &snap_conf, netns]),
        ("platform=minikube", [bin, conf, "/var/run/docker/netns"]),
        (
            "platform=openshift",
            ["/var/lib/cni/bin", "/etc/cni/multus/net.d", netns],
        ),
        (
            "platform=k3s,cni.binDir=/mine,cni.netnsDir=/theirs",
            ["/mine", k3s.1, "/theirs"],
        ),
    ] {
        let objects = rendered(&helm, &[settings]);
        let agent = pod(&objects, "ambidex-agent");
        let volumes = list(agent, "volumes");
        let path = |name: &str| {
            let volume = volumes.iter().find(|v| v["name"] == name).unwrap();
            volume["hostPath"]["path"].as_str().unwrap()
        };
        let found = ["cni-bin", "cni-conf", "netns"].map(path);
        assert_eq!(found, wanted, "{settings}");
        // Under the path that the runtime tells the plugin.
        assert!(
            mounts(container(agent, "agent")).contains(wanted[2]),
            "{settings}"
        );
        let openshift = settings == "platform=openshift";
        let chained = flag(container(agent, "install-cni"), "--chained");
        assert_eq!(chained == "false", openshift, "{settings}");
        let quota = objects.keys().any(|(kind, _)| kind == "ResourceQuota");
        assert_eq!(quota, settings == "platform=gke", "{settings}");
    }
    for (settings, chained) in [
        ("platform=openshift,cni.chained=true", "true"),
        ("cni.chained=false", "false"),
    ] {
        let objects = rendered(&helm, &[settings]);
        let installer = container(pod(&objects, "ambidex-agent"), "install-cni");
        assert_eq!(flag(installer, "--chained"), chained, "{settings}");
    }
}

/// Every object is read into its type and written again: a key that Kubernetes does not know would be lost.
#[cfg(feature = "kubernetes")]
#[test]
fn kubernetes_knows_every_key() {
    use k8s_openapi::api::apps::v1::DaemonSet;
    use k8s_openapi::api::core::v1::{ResourceQuota, ServiceAccount};
    use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};

    fn again<T: serde::de::DeserializeOwned + serde::Serialize>(object: &Value) -> Value {
        let typed: T =
            serde_json::from_value(object.clone()).unwrap_or_else(|e| panic!("{e}: {object}"));
        serde_json::to_value(typed).unwrap()
    }
    for (form, objects) in forms() {
        for ((kind, name), object) in &objects {
            let again = match kind.as_str() {
                "DaemonSet" => again::<DaemonSet>(object),
                "ServiceAccount" => again::<ServiceAccount>(object),
                "ClusterRole" => again::<ClusterRole>(object),
                "ClusterRoleBinding" => again::<ClusterRoleBinding>(object),
                "ResourceQuota" => again::<ResourceQuota>(object),
                other => panic!("{form}: {other}"),
            };
            assert_eq!(&again, object, "{form}: {name}");
        }
    }
}
