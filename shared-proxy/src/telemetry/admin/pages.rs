//! One function per page, and the table that leads to them.

use std::convert::Infallible;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use serde_json::{Map, json};

use super::profile::Kind;
use super::{Admin, Site};
use crate::telemetry::exposition::wants_open_metrics;

/// Largest request body in bytes that is read (and thrown away: no page takes one).
const BODY_LIMIT: usize = 64 * 1024;

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";
const BINARY: &str = "application/octet-stream";

pub(super) type Answer = Response<Full<Bytes>>;

struct Page {
    path: &'static str,
    methods: &'static [Method],
    about: &'static str,
    show: Show,
}

/// How an answer is made.
#[derive(Clone, Copy)]
enum Show {
    Now(fn(&Admin, &Query) -> Answer),
    Profile(Kind),
}

pub(super) struct Query {
    method: Method,
    pub(super) text: String,
    accept: Option<String>,
}

const ONLY_GET: &[Method] = &[Method::GET];
const READ: &[Method] = &[Method::GET, Method::HEAD];
const READ_AND_POST: &[Method] = &[Method::GET, Method::HEAD, Method::POST];
const POST: &[Method] = &[Method::POST];

const ADMIN: &[Page] = &[
    Page {
        path: "/",
        methods: READ,
        about: "this list",
        show: Show::Now(index),
    },
    Page {
        path: "/config_dump",
        methods: READ,
        about: "what this proxy knows, as JSON; ?section=NAME shows one part of it",
        show: Show::Now(config_dump),
    },
    Page {
        path: "/connections",
        methods: READ,
        about: "the open connections, as JSON",
        show: Show::Now(connections),
    },
    Page {
        path: "/logging",
        methods: READ_AND_POST,
        about: "shows the log filter; POST ?level=LEVEL or ?level=TARGET=LEVEL,.. adds to it, ?reset goes back",
        show: Show::Now(logging),
    },
    Page {
        path: "/quitquitquit",
        methods: POST,
        about: "POST drains and stops this proxy",
        show: Show::Now(quit),
    },
    Page {
        path: "/debug/pprof/profile",
        methods: ONLY_GET,
        about: "where processor time goes, for pprof; ?seconds=10&frequency=100",
        show: Show::Profile(Kind::Cpu),
    },
    Page {
        path: "/debug/pprof/heap",
        methods: ONLY_GET,
        about: "who allocated the memory in use, for pprof",
        show: Show::Profile(Kind::Heap),
    },
];

const METRICS: &[Page] = &[
    Page {
        path: "/metrics",
        methods: READ,
        about: "metrics",
        show: Show::Now(metrics),
    },
    Page {
        path: "/stats/prometheus",
        methods: READ,
        about: "the same",
        show: Show::Now(metrics),
    },
];

const READINESS: &[Page] = &[Page {
    path: "/healthz/ready",
    methods: READ,
    about: "200 when ready, 500 with what is missing",
    show: Show::Now(ready),
}];

fn pages(site: Site) -> &'static [Page] {
    match site {
        Site::Admin => ADMIN,
        Site::Metrics => METRICS,
        Site::Readiness => READINESS,
    }
}

pub(super) async fn answer(
    site: Site,
    admin: &Admin,
    request: Request<Incoming>,
) -> Result<Answer, Infallible> {
    let (head, body) = request.into_parts();
    if !swallow(body).await {
        return Ok(text(
            StatusCode::PAYLOAD_TOO_LARGE,
            "no page here takes a body\n",
        ));
    }
    let Some(page) = pages(site).iter().find(|page| page.path == head.uri.path()) else {
        return Ok(text(
            StatusCode::NOT_FOUND,
            format!("no such page\n\n{}", list(site)),
        ));
    };
    if !page.methods.contains(&head.method) {
        let names: Vec<_> = page.methods.iter().map(Method::as_str).collect();
        let allow = names.join(", ");
        let mut answer = text(
            StatusCode::METHOD_NOT_ALLOWED,
            format!("{} allows {allow}\n", page.path),
        );
        if let Ok(value) = HeaderValue::from_str(&allow) {
            answer.headers_mut().insert(header::ALLOW, value);
        }
        return Ok(answer);
    }
    let query = Query {
        method: head.method,
        text: head.uri.query().unwrap_or_default().to_owned(),
        accept: head
            .headers
            .get(header::ACCEPT)
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned),
    };
    Ok(match (page.show, &admin.profiles) {
        (Show::Now(show), _) => show(admin, &query),
        (Show::Profile(kind), Some(profiles)) => profiles.answer(kind, &query).await,
        (Show::Profile(_), None) => text(
            StatusCode::NOT_IMPLEMENTED,
            "this process takes no profiles of itself\n",
        ),
    })
}

/// Reads a body to its end without keeping it, because closing a socket with unread bytes resets the connection and the
/// client loses its answer. False when it is too long or does not end well.
async fn swallow(mut body: Incoming) -> bool {
    let mut read = 0;
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => read += frame.data_ref().map_or(0, Bytes::len),
            Err(_) => return false,
        }
        if read > BODY_LIMIT {
            return false;
        }
    }
    true
}

fn list(site: Site) -> String {
    pages(site)
        .iter()
        .map(|page| format!("{:<24}{}\n", page.path, page.about))
        .collect()
}

fn index(_: &Admin, _: &Query) -> Answer {
    text(StatusCode::OK, list(Site::Admin))
}

fn config_dump(admin: &Admin, query: &Query) -> Answer {
    let wanted = parameter(&query.text, "section");
    let wants = |name: &str| wanted.as_deref().is_none_or(|wanted| wanted == name);
    let build = admin.telemetry.options();
    let mut dump = Map::new();
    if wants("version") {
        dump.insert(
            "version".into(),
            json!({ "component": build.component, "version": build.tag }),
        );
    }
    for (name, read) in &admin.sections {
        if wants(name) {
            dump.insert((*name).into(), read());
        }
    }
    if wants("connections") {
        match serde_json::to_value(admin.telemetry.connections()) {
            Ok(connections) => dump.insert("connections".into(), connections),
            Err(error) => return failure(&error),
        };
    }
    match wanted {
        None => as_json(&dump),
        Some(wanted) => match dump.remove(&wanted) {
            Some(section) => as_json(&section),
            None => text(
                StatusCode::NOT_FOUND,
                format!("no section {wanted:?} in the dump\n"),
            ),
        },
    }
}

fn connections(admin: &Admin, _: &Query) -> Answer {
    as_json(&admin.telemetry.connections())
}

fn as_json<T: serde::Serialize>(value: &T) -> Answer {
    match serde_json::to_string_pretty(value) {
        Ok(mut body) => {
            body.push('\n');
            respond(StatusCode::OK, JSON, body)
        }
        Err(error) => failure(&error),
    }
}

fn logging(admin: &Admin, query: &Query) -> Answer {
    let Some(control) = &admin.logging else {
        return text(
            StatusCode::NOT_IMPLEMENTED,
            "the log filter of this process is fixed\n",
        );
    };
    if query.method == Method::POST {
        // `reset` needs no value; what is set with it comes on top.
        let flagged = query.text.split('&').any(|part| part == "reset");
        let reset = flagged.then(|| "reset".to_owned());
        for filter in reset.into_iter().chain(parameter(&query.text, "level")) {
            if let Err(error) = control.set(&filter) {
                return text(
                    StatusCode::BAD_REQUEST,
                    format!("log filter {filter:?}: {error}\n"),
                );
            }
        }
    }
    text(
        StatusCode::OK,
        format!("current log level is {}\n", control.current()),
    )
}

fn quit(admin: &Admin, _: &Query) -> Answer {
    match &admin.shutdown {
        Some(stop) => {
            stop();
            text(StatusCode::OK, "shutting down\n")
        }
        None => text(
            StatusCode::NOT_IMPLEMENTED,
            "this process is stopped by whoever started it\n",
        ),
    }
}

fn metrics(admin: &Admin, query: &Query) -> Answer {
    let (content_type, text) = match wants_open_metrics(query.accept.as_deref()) {
        true => (OPEN_METRICS, admin.telemetry.encode()),
        false => (PROMETHEUS, admin.telemetry.encode_prometheus()),
    };
    match text {
        Ok(body) => respond(StatusCode::OK, content_type, body),
        Err(error) => failure(&error),
    }
}

fn ready(admin: &Admin, _: &Query) -> Answer {
    let pending = admin.readiness.pending();
    if pending.is_empty() {
        text(StatusCode::OK, "ready\n")
    } else {
        text(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("not ready, pending: {}\n", pending.join(", ")),
        )
    }
}

fn failure(error: &dyn std::fmt::Display) -> Answer {
    text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n"))
}

pub(super) fn binary(body: Vec<u8>) -> Answer {
    respond(StatusCode::OK, BINARY, body)
}

pub(super) fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    respond(status, TEXT, body)
}

fn respond(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

/// First value of a query parameter, percent-decoded.
pub(super) fn parameter(query: &str, name: &str) -> Option<String> {
    query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| percent_decoded(value))
}

/// Leaves a `%` that no two hex digits follow as it is.
fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let escaped = match (first, tail) {
            (b'%', [high, low, ..]) => hex(*high).zip(hex(*low)),
            _ => None,
        };
        match escaped {
            Some((high, low)) => {
                bytes.push(high << 4 | low);
                rest = &tail[2..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit)
        .to_digit(16)
        .and_then(|value| u8::try_from(value).ok())
}
