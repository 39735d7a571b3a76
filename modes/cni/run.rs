//! The plugin's verbs.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::process::ExitCode;
use std::time::Duration;

use http::{Method, StatusCode};
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    CniArgs, CniError, ErrorOutput, NetConf, PodEvent, SUPPORTED_VERSIONS, ValidSandboxes,
};
use crate::run_dir::RunDir;
use crate::unix_http;

/// How long the agent may take for one pod. The field's plugin waits as long; the agent knows and gives up before.
const AGENT_TIMEOUT: Duration = Duration::from_secs(5);
/// Far more than any network configuration, in bytes.
const INPUT_LIMIT: u64 = 4 << 20;

/// Environment of one invocation.
#[derive(Debug)]
struct Invocation {
    command: String,
    container_id: String,
    netns: String,
    args: String,
}

impl Invocation {
    fn from_env() -> Self {
        let variable = |name: &str| std::env::var(name).unwrap_or_default();
        Self {
            command: variable("CNI_COMMAND"),
            container_id: variable("CNI_CONTAINERID"),
            netns: variable("CNI_NETNS"),
            args: variable("CNI_ARGS"),
        }
    }
}

/// Entry point of the binary `ambidex-cni`.
pub fn main() -> ExitCode {
    let mut input = Vec::new();
    let outcome = std::io::stdin()
        .take(INPUT_LIMIT)
        .read_to_end(&mut input)
        .map_err(|e| CniError::io(format!("standard input: {e}")))
        .and_then(|_| run(&Invocation::from_env(), &input));
    let (output, code) = match outcome {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(result)) => (result.to_string(), ExitCode::SUCCESS),
        Err(error) => {
            eprintln!("ambidex-cni: {error}");
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

fn run(invocation: &Invocation, input: &[u8]) -> Result<Option<Value>, CniError> {
    match invocation.command.as_str() {
        "VERSION" => {
            let version = version_for_errors(input);
            Ok(Some(
                json!({ "cniVersion": version, "supportedVersions": SUPPORTED_VERSIONS }),
            ))
        }
        "ADD" => add(invocation, &NetConf::parse(input)?).map(Some),
        "DEL" => delete(invocation, &NetConf::parse(input)?).map(|()| None),
        "CHECK" => check(invocation, &NetConf::parse(input)?).map(|()| None),
        "STATUS" => status(&NetConf::parse(input)?).map(|()| None),
        "GC" => collect_garbage(&NetConf::parse(input)?).map(|()| None),
        "" => Err(CniError::invalid_environment(
            "CNI_COMMAND is not set: this program is run by a container runtime",
        )),
        other => Err(CniError::invalid_environment(format!(
            "CNI_COMMAND {other:?} is not one of ADD, DEL, CHECK, STATUS, GC, VERSION"
        ))),
    }
}

fn add(invocation: &Invocation, conf: &NetConf) -> Result<Value, CniError> {
    if let Some(event) = event(invocation, conf)? {
        if event.netns.is_empty() {
            return Err(CniError::invalid_environment("CNI_NETNS is not set"));
        }
        post(conf, "/cmdadd", &event)?;
    }
    Ok(conf
        .prev_result
        .clone()
        .unwrap_or_else(|| json!({ "cniVersion": conf.cni_version })))
}

/// Without an agent this is done: the runtime must be able to take the sandbox down, and the next agent finds out that
/// the pod is gone.
fn delete(invocation: &Invocation, conf: &NetConf) -> Result<(), CniError> {
    let Some(event) = event(invocation, conf)? else {
        return Ok(());
    };
    match post(conf, "/cmddel", &event) {
        Err(Unanswered::Nobody(why)) => {
            eprintln!("ambidex-cni: {why}; it will find the pod gone");
            Ok(())
        }
        done => Ok(done?),
    }
}

fn collect_garbage(conf: &NetConf) -> Result<(), CniError> {
    match &conf.valid_attachments {
        Some(attachments) if conf.ambient_enabled => {
            let container_ids = attachments.iter().map(|a| a.container_id.clone());
            let valid = ValidSandboxes {
                container_ids: container_ids.collect(),
            };
            Ok(post(conf, "/cmdgc", &valid)?)
        }
        _ => Ok(()),
    }
}

fn check(invocation: &Invocation, conf: &NetConf) -> Result<(), CniError> {
    match event(invocation, conf)? {
        Some(event) => Ok(post(conf, "/cmdcheck", &event)?),
        None => Ok(()),
    }
}

fn status(conf: &NetConf) -> Result<(), CniError> {
    if !conf.ambient_enabled {
        return Ok(());
    }
    match exchange(conf, Method::GET, "/status", Vec::new())? {
        (StatusCode::OK, _) => Ok(()),
        (_, text) => Err(CniError::unavailable(text)),
    }
}

/// The pod of this invocation, if it is one that is captured.
fn event(invocation: &Invocation, conf: &NetConf) -> Result<Option<PodEvent>, CniError> {
    if !conf.ambient_enabled {
        return Ok(None);
    }
    let args = CniArgs::parse(&invocation.args)?;
    let first = |candidates: [&str; 2]| {
        candidates
            .into_iter()
            .find(|c| !c.is_empty())
            .unwrap_or_default()
            .to_owned()
    };
    let pod_namespace = first([
        &args.pod_namespace,
        conf.ambidex.namespace.as_deref().unwrap_or_default(),
    ]);
    if args.pod_name.is_empty()
        || pod_namespace.is_empty()
        || conf.exclude_namespaces.contains(&pod_namespace)
    {
        return Ok(None);
    }
    if invocation.container_id.is_empty() {
        return Err(CniError::invalid_environment("CNI_CONTAINERID is not set"));
    }
    Ok(Some(PodEvent {
        netns: invocation.netns.clone(),
        pod_name: args.pod_name.clone(),
        pod_namespace,
        ips: conf.addresses()?,
        pod_uid: first([&args.pod_uid, &invocation.container_id]),
        service_account: first([
            &args.service_account,
            conf.ambidex.service_account.as_deref().unwrap_or("default"),
        ]),
        container_id: invocation.container_id.clone(),
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
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
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
            args: args.to_owned(),
        }
    }

    #[test]
    fn a_pod_that_is_not_ours_passes_with_its_previous_result_untouched() {
        let input = br#"{"cniVersion":"1.0.0","ambient_enabled":true,"prevResult":{"cniVersion":"1.0.0","z":1,"a":{"b":[2]}}}"#;
        let output = run(&invocation("ADD", ""), input).unwrap().unwrap();
        assert_eq!(
            output.to_string(),
            r#"{"cniVersion":"1.0.0","z":1,"a":{"b":[2]}}"#
        );
        let excluded = run(
            &invocation("ADD", "K8S_POD_NAME=a;K8S_POD_NAMESPACE=kube-system"),
            input,
        )
        .unwrap();
        assert!(excluded.is_some());
    }

    #[test]
    fn a_pod_that_is_ours_does_not_start_without_an_agent() {
        let directory = tempfile::tempdir().unwrap();
        let input = format!(
            r#"{{"cniVersion":"1.0.0","ambient_enabled":true,"cni_agent_run_dir":{:?}}}"#,
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
            r#"{{"cniVersion":"1.0.0","ambient_enabled":true,"cni_agent_run_dir":{:?}}}"#,
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
