//! Requests and their answers, but for the streams of watches.

use std::collections::BTreeMap;

use http::Method;
use serde_json::{Value, json};

use super::selector::Selector;
use super::store::{Key, Kind, Refusal, Store};

/// A request's path, taken apart.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    pub kind: Kind,
    /// Empty: all.
    pub namespace: String,
    /// Empty: a list.
    pub name: String,
    pub status: bool,
}

impl Target {
    /// None for a path of something else.
    pub fn parse(path: &str) -> Option<Self> {
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let (group, rest) = match parts.as_slice() {
            ["api", "v1", rest @ ..] => ("v1", rest),
            ["apis", group, version, rest @ ..] => {
                let group = format!("{group}/{version}");
                let known = Kind::ALL.iter().find(|kind| kind.api_version() == group)?;
                (known.api_version(), rest)
            }
            _ => return None,
        };
        let (namespace, rest) = match rest {
            ["namespaces", namespace, plural, rest @ ..] if *plural != "status" => {
                (*namespace, [&[*plural], rest].concat())
            }
            rest => ("", rest.to_vec()),
        };
        let (plural, name, subresource) = match rest.as_slice() {
            [plural] => (*plural, "", ""),
            [plural, name] => (*plural, *name, ""),
            [plural, name, subresource] => (*plural, *name, *subresource),
            _ => return None,
        };
        let kind = *Kind::ALL.iter().find(|kind| kind.plural() == plural)?;
        let status = subresource == "status";
        let known = kind.api_version() == group && (status || subresource.is_empty());
        known.then(|| Self {
            kind,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            status,
        })
    }

    /// As in a rule of RBAC.
    pub fn resource(&self) -> String {
        let subresource = if self.status { "/status" } else { "" };
        format!("{}{subresource}", self.kind.plural())
    }

    pub fn key(&self) -> Key {
        (self.kind, self.namespace.clone(), self.name.clone())
    }
}

/// Parameters of a request.
pub type Query = BTreeMap<String, String>;

/// The verb of a request, as in a rule of RBAC.
pub fn verb(method: &Method, target: &Target, query: &Query) -> &'static str {
    let watches = query
        .get("watch")
        .is_some_and(|value| ["1", "true"].contains(&value.as_str()));
    match *method {
        Method::GET if watches => "watch",
        Method::GET if target.name.is_empty() => "list",
        Method::GET => "get",
        Method::POST => "create",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "update",
    }
}

pub fn selector(query: &Query) -> Result<Selector, Refusal> {
    let text = |name: &str| query.get(name).map_or("", String::as_str);
    Selector::parse(text("fieldSelector"), text("labelSelector"))
        .map_err(|message| (400, "BadRequest", message))
}

/// Everything but a watch.
pub fn answer(
    store: &Store,
    verb: &str,
    target: &Target,
    query: &Query,
    content_type: &str,
    body: &[u8],
) -> Result<Value, Refusal> {
    let parsed = || -> Result<Value, Refusal> {
        serde_json::from_slice(body).map_err(|error| (400, "BadRequest", error.to_string()))
    };
    match verb {
        "list" => {
            let selector = selector(query)?;
            let (version, mut items) = store.list(target.kind, &target.namespace);
            items.retain(|object| selector.matches(object));
            Ok(json!({
                "kind": format!("{}List", target.kind.name()),
                "apiVersion": target.kind.api_version(),
                "metadata": {"resourceVersion": version.to_string()},
                "items": items,
            }))
        }
        "get" => store.get(&target.key()).ok_or_else(|| {
            (
                404,
                "NotFound",
                format!("{} {:?} not found", target.kind.plural(), target.name),
            )
        }),
        "create" => {
            let mut object = parsed()?;
            if target.kind != Kind::Namespace {
                object["metadata"]["namespace"] = target.namespace.clone().into();
            }
            store.create(target.kind, object)
        }
        "patch" => {
            let strategic = match content_type.split(';').next().unwrap_or_default() {
                "application/strategic-merge-patch+json" => true,
                "application/merge-patch+json" => false,
                other => {
                    return Err((415, "UnsupportedMediaType", format!("a patch as {other:?}")));
                }
            };
            store.patch(&target.key(), target.status, strategic, &parsed()?)
        }
        "update" => store.update(&target.key(), target.status, &parsed()?),
        "delete" => store.delete(&target.key()),
        other => Err((405, "MethodNotAllowed", other.to_owned())),
    }
}

/// Pages by which a client finds out what there is.
pub fn discovery(path: &str) -> Option<Value> {
    let resources = |version: &str| {
        let of_version = Kind::ALL
            .iter()
            .filter(|kind| kind.api_version() == version);
        let resources: Vec<Value> = of_version
            .flat_map(|kind| {
                let resource = |name: String, verbs: &[&str]| {
                    json!({
                        "name": name, "singularName": kind.name().to_lowercase(), "kind": kind.name(),
                        "namespaced": *kind != Kind::Namespace, "verbs": verbs,
                    })
                };
                let all = ["create", "delete", "get", "list", "patch", "watch"];
                [
                    resource(kind.plural().to_owned(), &all),
                    resource(format!("{}/status", kind.plural()), &["get", "patch"]),
                ]
            })
            .collect();
        json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources})
    };
    Some(match path {
        "/version" => json!({
            "major": "1", "minor": "32", "gitVersion": "v1.32.0", "gitCommit": "", "gitTreeState": "clean",
            "buildDate": "2024-01-01T00:00:00Z", "goVersion": "", "compiler": "", "platform": "linux/amd64",
        }),
        "/api" => {
            json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []})
        }
        "/apis" => {
            let version = json!({"groupVersion": "events.k8s.io/v1", "version": "v1"});
            json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": [
                {"name": "events.k8s.io", "versions": [version], "preferredVersion": version}]})
        }
        "/api/v1" => resources("v1"),
        "/apis/events.k8s.io/v1" => resources("events.k8s.io/v1"),
        _ => return None,
    })
}

/// A refusal as clients read it.
pub fn status((code, reason, message): &Refusal) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    })
}
