//! The plugin's verbs.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::process::ExitCode;
use std::time::Duration;

use http::{Method, StatusCode};
use serde::Serialize;
use serde_json::{Value, json};

use super::config::is_identifier;
use super::{
    Captured, CniArgs, CniError, ErrorOutput, NetConf, PodEvent, SUPPORTED_VERSIONS,
    ValidAttachments,
};
use crate::run_dir::RunDir;
use crate::unix_http;

/// How long the agent may take for one pod. The field's plugin waits as long; the agent knows and gives up before.
const AGENT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the agent may take for a log line.
const LOG_TIMEOUT: Duration = Duration::from_millis(200);
/// Far more than any network configuration, in bytes.
const INPUT_LIMIT: u64 = 4 << 20;

/// Longest name of a network interface, in bytes (IFNAMSIZ without its final 0).
const INTERFACE_NAME_LIMIT: usize = 15;

/// Environment of one invocation.
#[derive(Debug)]
struct Invocation {
    command: String,
    container_id: String,
    netns: String,
    if_name: String,
    args: String,
}

impl Invocation {
    fn from_env() -> Self {
        let variable = |name: &str| {
            let value = std::env::var_os(name).unwrap_or_default();
            value.to_string_lossy().into_owned()
        };
        Self {
            command: variable("CNI_COMMAND"),
            container_id: variable("CNI_CONTAINERID"),
            netns: variable("CNI_NETNS"),
            if_name: variable("CNI_IFNAME"),
            args: variable("CNI_ARGS"),
        }
    }

    /// Fails unless the variables of an attachment are as the specification wants them.
    fn require_attachment(&self, with_netns: bool) -> Result<(), CniError> {
        let wrong = |what: String| Err(CniError::invalid_environment(what));
        let shown = |text: &str| text.chars().take(40).collect::<String>();
        if self.container_id.is_empty() {
            return wrong("CNI_CONTAINERID is not set".to_owned());
        }
        if !is_identifier(&self.container_id) {
            return wrong(format!(
                "CNI_CONTAINERID {:?}: want letters, digits, '_', '.' and '-', beginning with a letter or digit",
                shown(&self.container_id)
            ));
        }
        if with_netns && self.netns.is_empty() {
            return wrong("CNI_NETNS is not set".to_owned());
        }
        if self.if_name.is_empty() {
            return wrong("CNI_IFNAME is not set".to_owned());
        }
        if self.if_name.len() > INTERFACE_NAME_LIMIT
            || [".", ".."].contains(&self.if_name.as_str())
            || self
                .if_name
                .contains(|c: char| "/:".contains(c) || c.is_whitespace() || c.is_control())
        {
            return wrong(format!(
                "CNI_IFNAME {:?} is not the name of an interface",
                shown(&self.if_name)
            ));
        }
        Ok(())
    }
}

/// Entry point of the binary `ambidex-cni`.
pub fn main() -> ExitCode {
    let mut input = Vec::new();
    let invocation = Invocation::from_env();
    let outcome = std::io::stdin()
        .take(INPUT_LIMIT)
        .read_to_end(&mut input)
        .map_err(|e| CniError::io(format!("standard input: {e}")))
        .and_then(|_| run(&invocation, &input));
    let (output, code) = match outcome {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(result)) => (result, ExitCode::SUCCESS),
        Err(error) => {
            log(&invocation, &error, &input);
            let version = version_for_errors(&input);
            let output = ErrorOutput {
                cni_version: &version,
                code: error.code,
                msg: error.msg,
                details: &error.details,
            };
            (
                serde_json::to_string(&output).unwrap_or_default(),
                ExitCode::FAILURE,
            )
        }
    };
    match writeln!(std::io::stdout(), "{output}") {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

/// A failure as a line of JSON: on standard error, and to the agent, which has a log that is kept. If that does not take it
/// soon, nothing is lost that the runtime does not have.
fn log(invocation: &Invocation, error: &CniError, input: &[u8]) {
    let line = json!({
        "level": "error",
        "msg": format!("{} of {}: {error}", invocation.command, invocation.container_id),
    });
    eprintln!("{line}");
    let Ok(conf) = NetConf::parse(input) else {
        return;
    };
    let socket = RunDir::new(&conf.cni_agent_run_dir).plugin_log();
    let body = json!([line.to_string()]).to_string().into_bytes();
    let delivery = unix_http::request(&socket, Method::POST, "/log", body, LOG_TIMEOUT);
    if let Ok(runtime) = runtime() {
        let _ = runtime.block_on(delivery);
    }
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
}

/// The version that an error object carries: the request's, if it can be read at all.
fn version_for_errors(input: &[u8]) -> String {
    serde_json::from_slice::<BTreeMap<String, Value>>(input)
        .ok()
        .and_then(|conf| {
            conf.get("cniVersion")
                .and_then(Value::as_str)
                .map(str::to_owned)
        })
        .filter(|version| SUPPORTED_VERSIONS.contains(&version.as_str()))
        .unwrap_or_else(|| "1.0.0".to_owned())
}

fn run(invocation: &Invocation, input: &[u8]) -> Result<Option<String>, CniError> {
    match invocation.command.as_str() {
        "VERSION" => {
            let version = version_for_errors(input);
            let answer = json!({ "cniVersion": version, "supportedVersions": SUPPORTED_VERSIONS });
            Ok(Some(answer.to_string()))
        }
        "ADD" => add(invocation, &NetConf::parse(input)?).map(Some),
        "DEL" => delete(invocation, &NetConf::parse(input)?).map(|()| None),
        "CHECK" => check(invocation, &NetConf::parse(input)?).map(|()| None),
        "STATUS" => status(&NetConf::parse(input)?).map(|()| None),
        "GC" => collect_garbage(NetConf::parse(input)?).map(|()| None),
        "" => Err(CniError::invalid_environment(
            "CNI_COMMAND is not set: this program is run by a container runtime",
        )),
        other => Err(CniError::invalid_environment(format!(
            "CNI_COMMAND {:?} is not one of ADD, DEL, CHECK, STATUS, GC, VERSION",
            other.chars().take(40).collect::<String>()
        ))),
    }
}

fn add(invocation: &Invocation, conf: &NetConf) -> Result<String, CniError> {
    invocation.require_attachment(true)?;
    if let Some(event) = event(invocation, conf)? {
        post(conf, "/cmdadd", &event)?;
    }
    Ok(conf.prev_result.as_ref().map_or_else(
        || json!({ "cniVersion": conf.cni_version }).to_string(),
        |result| result.get().to_owned(),
    ))
}

/// Without an agent this is done: the runtime must be able to take the sandbox down, and the next agent finds out that
/// the pod is gone. For the same reason nothing is read from a previous result, which a runtime may have lost.
fn delete(invocation: &Invocation, conf: &NetConf) -> Result<(), CniError> {
    invocation.require_attachment(false)?;
    let without_result = NetConf {
        prev_result: None,
        ..conf.clone()
    };
    let Some(event) = event(invocation, &without_result)? else {
        return Ok(());
    };
    match post(conf, "/cmddel", &event) {
        Err(Unanswered::Nobody(why)) => {
            let msg = format!("{why}; it will find the pod gone");
            eprintln!("{}", json!({ "level": "warn", "msg": msg }));
            Ok(())
        }
        done => Ok(done?),
    }
}

fn collect_garbage(conf: NetConf) -> Result<(), CniError> {
    conf.require_version("GC", "1.1.0")?;
    let Some(attachments) = conf.valid_attachments.clone() else {
        return Err(CniError::invalid_config(
            "GC without cni.dev/valid-attachments: which attachments exist?",
        ));
    };
    if !conf.ambient_enabled {
        return Ok(());
    }
    let valid = ValidAttachments {
        network: conf.name.clone(),
        attachments: attachments.into_iter().collect(),
    };
    Ok(post(&conf, "/cmdgc", &valid)?)
}

fn check(invocation: &Invocation, conf: &NetConf) -> Result<(), CniError> {
    conf.require_version("CHECK", "0.4.0")?;
    invocation.require_attachment(true)?;
    if conf.prev_result.is_none() {
        return Err(CniError::invalid_config(
            "CHECK without prevResult: which addresses does the sandbox have?",
        ));
    }
    match event(invocation, conf)? {
        Some(event) => Ok(post(conf, "/cmdcheck", &event)?),
        None => Ok(()),
    }
}

fn status(conf: &NetConf) -> Result<(), CniError> {
    conf.require_version("STATUS", "1.1.0")?;
    if !conf.ambient_enabled {
        return Ok(());
    }
    match exchange(conf, Method::GET, "/status", Vec::new()) {
        Ok((StatusCode::OK, _)) => Ok(()),
        Ok((StatusCode::BAD_GATEWAY, text)) => Err(CniError::limited(text)),
        Ok((_, text)) => Err(CniError::unavailable(text)),
        Err(unanswered) => Err(CniError::unavailable(CniError::from(unanswered).details)),
    }
}

/// The pod of this invocation, if it is one that is captured.
fn event(invocation: &Invocation, conf: &NetConf) -> Result<Option<PodEvent>, CniError> {
    if !conf.ambient_enabled {
        return Ok(None);
    }
    let args = CniArgs::parse(&invocation.args)?;
    let first = |candidates: [&str; 3]| {
        let found = candidates.into_iter().find(|c| !c.is_empty());
        found.unwrap_or_default().to_owned()
    };
    let configured = |value: &'_ Option<String>| value.clone().unwrap_or_default();
    let always = args.capture.unwrap_or(conf.ambidex.capture) == Captured::Always;
    let (pod_name, pod_namespace) = if always {
        (
            first([&args.pod_name, &invocation.container_id, ""]),
            first([
                &args.pod_namespace,
                &configured(&conf.ambidex.namespace),
                "default",
            ]),
        )
    } else {
        (args.pod_name.clone(), args.pod_namespace.clone())
    };
    if pod_name.is_empty()
        || pod_namespace.is_empty()
        || conf.exclude_namespaces.contains(&pod_namespace)
        || conf.is_own_pod(&pod_namespace, &pod_name)
    {
        return Ok(None);
    }
    Ok(Some(PodEvent {
        netns: invocation.netns.clone(),
        pod_name,
        pod_namespace,
        ips: conf.addresses()?,
        pod_uid: first([&args.pod_uid, &invocation.container_id, ""]),
        service_account: first([
            &args.service_account,
            &configured(&conf.ambidex.service_account),
            "default",
        ]),
        container_id: invocation.container_id.clone(),
        network: conf.name.clone(),
        if_name: invocation.if_name.clone(),
        dns_capture: args.dns_capture.or_else(|| conf.dns_capture()),
        extent: args.extent(&conf.extent()),
    }))
}

/// Why there is no answer of an agent, or not the wanted one.
enum Unanswered {
    /// Nobody listens on the agent's socket.
    Nobody(String),
    /// Anything else.
    Error(CniError),
}

impl From<Unanswered> for CniError {
    fn from(unanswered: Unanswered) -> Self {
        match unanswered {
            Unanswered::Nobody(why) => CniError::try_again(why),
            Unanswered::Error(error) => error,
        }
    }
}

fn post(conf: &NetConf, path: &str, event: &impl Serialize) -> Result<(), Unanswered> {
    let body = serde_json::to_vec(event)
        .map_err(|e| Unanswered::Error(CniError::internal(e.to_string())))?;
    let (status, text) = exchange(conf, Method::POST, path, body)?;
    Err(Unanswered::Error(match status {
        StatusCode::OK => return Ok(()),
        StatusCode::BAD_REQUEST => CniError::invalid_config(text),
        StatusCode::SERVICE_UNAVAILABLE => CniError::try_again(text),
        _ => CniError::internal(text),
    }))
}

fn exchange(
    conf: &NetConf,
    method: Method,
    path: &str,
    body: Vec<u8>,
) -> Result<(StatusCode, String), Unanswered> {
    let socket = RunDir::new(&conf.cni_agent_run_dir).plugin_events();
    let runtime = runtime()
        .map_err(|e| Unanswered::Error(CniError::internal(format!("cannot start: {e}"))))?;
    let asked = unix_http::request(&socket, method, path, body, AGENT_TIMEOUT);
    match runtime.block_on(asked) {
        Ok((status, body)) => Ok((status, String::from_utf8_lossy(&body).trim_end().to_owned())),
        Err(error) if error.is_nobody() => Err(Unanswered::Nobody(error.to_string())),
        Err(error) => Err(Unanswered::Error(CniError::try_again(error.to_string()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn invocation(command: &str, args: &str) -> Invocation {
        Invocation {
            command: command.to_owned(),
            container_id: "c1".to_owned(),
            netns: "/run/netns/x".to_owned(),
            if_name: "eth0".to_owned(),
            args: args.to_owned(),
        }
    }

    fn config(version: &str, more: &str) -> Vec<u8> {
        format!(
            r#"{{"cniVersion":"{version}","name":"n","ambient_enabled":true,"cni_agent_run_dir":"/nowhere"{more}}}"#
        )
        .into_bytes()
    }

    #[test]
    fn a_pod_that_is_not_ours_passes_with_its_previous_result_byte_by_byte() {
        let results = [
            r#"{ "cniVersion":"1.1.0", "z":1e2,	"a":{"b":[ 18446744073709551616 ]},"a":"\u0041/" }"#,
            r#"{"cniVersion":"0.3.1","ips":[{"version":"4","address":"10.0.0.2/24","interface":0}],"dns":{}}"#,
        ];
        let args = [
            "",
            "K8S_POD_NAME=a",
            "K8S_POD_NAME=a;K8S_POD_NAMESPACE=kube-system",
            "K8S_POD_NAME=ztunnel-x;K8S_POD_NAMESPACE=mesh",
        ];
        for (result, args) in results.iter().flat_map(|r| args.map(|a| (r, a))) {
            for version in SUPPORTED_VERSIONS {
                let more = format!(r#","pod_namespace":"mesh","prevResult":{result}"#);
                let output = run(&invocation("ADD", args), &config(version, &more));
                assert_eq!(output.unwrap().unwrap(), *result, "{version} {args}");
            }
        }
    }

    #[test]
    fn what_is_captured_always_needs_no_arguments() {
        let asked = |more: &str, args: &str| {
            let conf = NetConf::parse(&config("1.0.0", more)).unwrap();
            let event = event(&invocation("ADD", args), &conf).unwrap();
            event.map(|e| format!("{}/{} {}", e.pod_namespace, e.pod_name, e.service_account))
        };
        let own = r#","ambidex":{"namespace":"shop","serviceAccount":"till","capture":"always"}"#;
        let labels = own.replace("always", "labels");
        assert_eq!(asked(own, "").unwrap(), "shop/c1 till");
        assert_eq!(asked(own, "K8S_POD_NAME=web").unwrap(), "shop/web till");
        let args = "AMBIDEX_NAMESPACE=a;AMBIDEX_SERVICE_ACCOUNT=b;K8S_POD_NAME=web";
        assert_eq!(asked(own, args).unwrap(), "a/web b");
        assert_eq!(asked(own, "AMBIDEX_CAPTURE=labels;K8S_POD_NAME=web"), None);
        assert_eq!(asked(&labels, "K8S_POD_NAME=web"), None);
        let pod = "K8S_POD_NAME=web;K8S_POD_NAMESPACE=b";
        assert_eq!(asked(&labels, pod).unwrap(), "b/web till");
        assert_eq!(
            asked("", "AMBIDEX_CAPTURE=always").unwrap(),
            "default/c1 default"
        );
    }

    #[test]
    fn variables_that_are_missing_or_wrong_are_named() {
        type Change = fn(&mut Invocation);
        let wrong: [(&str, Change); 7] = [
            ("CNI_CONTAINERID", |i| i.container_id.clear()),
            ("CNI_CONTAINERID", |i| i.container_id = "../c".to_owned()),
            ("CNI_NETNS", |i| i.netns.clear()),
            ("CNI_IFNAME", |i| i.if_name.clear()),
            ("CNI_IFNAME", |i| i.if_name = "..".to_owned()),
            ("CNI_IFNAME", |i| i.if_name = "a/b".to_owned()),
            ("CNI_IFNAME", |i| i.if_name = "interface-of-16b".to_owned()),
        ];
        for (name, change) in wrong {
            let mut invocation = invocation("ADD", "");
            change(&mut invocation);
            let error = run(&invocation, &config("1.0.0", "")).unwrap_err();
            assert_eq!(error.code, 4, "{error}");
            assert!(error.details.contains(name), "{error}");
        }
    }

    #[test]
    fn verbs_ask_for_what_they_need() {
        let code = |verb: &str, version: &str, more: &str| {
            run(&invocation(verb, ""), &config(version, more)).map_or_else(|e| e.code, |_| 0)
        };
        assert_eq!(code("CHECK", "0.3.1", r#","prevResult":{}"#), 1);
        assert_eq!(code("CHECK", "0.4.0", ""), 7);
        assert_eq!(code("CHECK", "0.4.0", r#","prevResult":{}"#), 0);
        assert_eq!(code("STATUS", "1.0.0", ""), 1);
        assert_eq!(code("STATUS", "1.1.0", ""), 50);
        assert_eq!(code("GC", "1.0.0", r#","cni.dev/valid-attachments":[]"#), 1);
        assert_eq!(code("GC", "1.1.0", ""), 7);
        assert_eq!(
            code("GC", "1.1.0", r#","cni.dev/valid-attachments":[]"#),
            11
        );
    }

    #[test]
    fn a_pod_that_is_ours_does_not_start_without_an_agent() {
        let directory = tempfile::tempdir().unwrap();
        let input = format!(
            r#"{{"cniVersion":"1.0.0","name":"n","ambient_enabled":true,"cni_agent_run_dir":{:?}}}"#,
            directory.path().display().to_string()
        );
        let error = run(
            &invocation("ADD", "K8S_POD_NAME=a;K8S_POD_NAMESPACE=b"),
            input.as_bytes(),
        )
        .unwrap_err();
        assert_eq!(error.code, 11);
        assert!(error.details.contains("pluginevent.sock"), "{error}");
    }

    #[test]
    fn a_sandbox_can_be_taken_down_without_an_agent() {
        let directory = tempfile::tempdir().unwrap();
        let input = format!(
            r#"{{"cniVersion":"1.0.0","name":"n","ambient_enabled":true,"cni_agent_run_dir":{:?}}}"#,
            directory.path().display().to_string()
        );
        let pod = invocation("DEL", "K8S_POD_NAME=a;K8S_POD_NAMESPACE=b");
        assert_eq!(run(&pod, input.as_bytes()), Ok(None));
    }

    #[test]
    fn version_lists_what_is_supported() {
        let output = run(&invocation("VERSION", ""), br#"{"cniVersion":"1.1.0"}"#)
            .unwrap()
            .unwrap();
        let output: Value = serde_json::from_str(&output).unwrap();
        assert_eq!(output["cniVersion"], "1.1.0");
        assert_eq!(
            output["supportedVersions"].as_array().unwrap().len(),
            SUPPORTED_VERSIONS.len()
        );
    }

    #[test]
    fn an_unknown_verb_is_an_environment_error() {
        assert_eq!(run(&invocation("", ""), b"{}").unwrap_err().code, 4);
        assert_eq!(run(&invocation("FROB", ""), b"{}").unwrap_err().code, 4);
    }
}
