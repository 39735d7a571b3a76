//! What the control plane sees of the variables that are about it: a real one, asked by real proxies.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Far over what a process takes to start here.
const SOON: Duration = Duration::from_secs(30);

/// A process whose output is in a file. It ends with this.
struct Running {
    child: Child,
    log: PathBuf,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
    fn start(log: PathBuf, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let output = File::create(&log).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_ambidex"))
            .args(arguments)
            .env_clear()
            .env("RUST_LOG", "info,control_plane=debug")
            .envs(environment.iter().copied())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        Self { child, log }
    }

    fn text(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Waits for the first of some texts in the log. Returns which one.
    fn says(&self, texts: &[&str]) -> usize {
        let deadline = Instant::now() + SOON;
        loop {
            let log = self.text();
            if let Some(which) = texts.iter().position(|text| log.contains(text)) {
                return which;
            }
            assert!(Instant::now() < deadline, "none of {texts:?} in:\n{log}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A control plane with a token, and what proxies of it need.
struct Plane {
    dir: TempDir,
    control: Running,
    address: String,
}

const TOKEN: &str = "the.right.one";

impl Plane {
    fn start() -> Self {
        let dir = TempDir::new().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        fs::create_dir(path("mesh")).unwrap();
        fs::write(path("token"), TOKEN).unwrap();
        fs::write(path("wrong-token"), "another.one").unwrap();
        let arguments = [
            "control",
            "--dir",
            &path("mesh"),
            "--listen",
            "127.0.0.1:0",
            "--ca-dir",
            &path("ca"),
            "--token-file",
            &path("token"),
        ];
        let control = Running::start(dir.path().join("control.log"), &arguments, &[]);
        control.says(&["control plane started"]);
        let log = control.text();
        let (_, after) = log.split_once("address=").unwrap();
        let address = after.split_whitespace().next().unwrap().to_owned();
        Self {
            dir,
            control,
            address,
        }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// A proxy that finds this control plane, unless its environment or its flags say otherwise.
    fn proxy(&self, name: &str, environment: &[(&str, &str)], flags: &[&str]) -> Running {
        let (roots, token, socket) = (
            self.path("ca/root-cert.pem"),
            self.path("token"),
            self.path("zds.sock"),
        );
        let ca = self.path("ca");
        let given = |variable: &str| environment.iter().any(|(name, _)| *name == variable);
        let usual = [
            ("XDS_ADDRESS", self.address.as_str()),
            ("XDS_ROOT_CA", roots.as_str()),
            ("AUTH_TOKEN", token.as_str()),
            ("INPOD_UDS", socket.as_str()),
            ("CA_ADDRESS", ""),
            ("AMBIDEX_CA_DIR", ca.as_str()),
            ("ADMIN_ADDR", "127.0.0.1:0"),
            ("STATS_ADDR", "127.0.0.1:0"),
            ("READINESS_ADDR", "127.0.0.1:0"),
        ];
        let usual = usual.into_iter().filter(|(name, _)| !given(name));
        let environment: Vec<_> = usual.chain(environment.iter().copied()).collect();
        let arguments = [&["proxy"], flags].concat();
        Running::start(
            Path::new(&self.path(name)).to_owned(),
            &arguments,
            &environment,
        )
    }

    /// Whether a proxy comes to follow the control plane.
    #[track_caller]
    fn is_followed(&self, environment: &[(&str, &str)]) -> bool {
        let proxy = self.proxy("proxy.log", environment, &[]);
        let follows = ["XDS stream opened", "XDS client connection error"];
        // The server's refusal of a call arrives as the error of a stream, before the stream counts as opened.
        proxy.says(&follows) == 0
    }
}

#[test]
fn who_the_proxy_is() {
    let plane = Plane::start();
    let variables = [
        ("INSTANCE_IP", "192.0.2.7"),
        ("POD_NAME", "z9"),
        ("POD_NAMESPACE", "mesh"),
        ("NODE_NAME", "node-of-variables"),
        ("CLUSTER_ID", "cluster-of-variables"),
        ("ISTIO_META_COLOUR", "blue"),
        ("ISTIO_METAJSON_MORE", r#"{"SHAPE": "round"}"#),
        ("XDS_HEADER_TENANT", "seven"),
    ];
    let _proxy = plane.proxy("variables.log", &variables, &[]);
    plane
        .control
        .says(&["client=ztunnel~192.0.2.7~z9.mesh~mesh.svc.cluster.local"]);
    for seen in [
        "node-of-variables",
        r#"("clusterid", "cluster-of-variables")"#,
        r#"("tenant", "seven")"#,
        "COLOUR",
        "blue",
        "SHAPE",
        "round",
    ] {
        plane.control.says(&[seen]);
    }
    let flags = [
        "--instance-ip",
        "192.0.2.8",
        "--pod-name",
        "z10",
        "--pod-namespace",
        "meshes",
        "--node-name",
        "node-of-flags",
        "--cluster-id",
        "cluster-of-flags",
    ];
    let _proxy = plane.proxy("flags.log", &[], &flags);
    plane
        .control
        .says(&["client=ztunnel~192.0.2.8~z10.meshes~meshes.svc.cluster.local"]);
    plane.control.says(&["node-of-flags"]);
    plane
        .control
        .says(&[r#"("clusterid", "cluster-of-flags")"#]);
    assert!(!plane.control.text().contains(TOKEN), "a token in the log");
}

#[test]
fn who_the_control_plane_is_and_what_proves_who_asks() {
    let plane = Plane::start();
    let roots = fs::read_to_string(plane.path("ca/root-cert.pem")).unwrap();
    let (wrong_token, none) = (plane.path("wrong-token"), plane.path("no-such-file"));
    let port = plane.address.rsplit(':').next().unwrap();
    let localhost = format!("localhost:{port}");
    let plain = format!("http://{}", plane.address);
    let scheme = format!("https://{}/", plane.address);
    for (environment, followed) in [
        (&[][..], true),
        (&[("XDS_ADDRESS", scheme.as_str())], true),
        (&[("XDS_ADDRESS", localhost.as_str())], true),
        (&[("XDS_ADDRESS", plain.as_str())], false),
        (&[("XDS_ROOT_CA", roots.as_str())], true),
        (&[("XDS_ROOT_CA", none.as_str())], false),
        (&[("XDS_ROOT_CA", "SYSTEM")], false),
        (&[("ALT_XDS_HOSTNAME", "istiod")], true),
        (&[("ALT_XDS_HOSTNAME", "istiod.example")], false),
        (&[("AUTH_TOKEN", TOKEN)], true),
        (&[("AUTH_TOKEN", wrong_token.as_str())], false),
        (&[("AUTH_TOKEN", "another.one")], false),
        (&[("AUTH_TOKEN", "")], false),
    ] {
        assert_eq!(plane.is_followed(environment), followed, "{environment:?}");
    }
}
