//! Selectors of lists and watches.

use serde_json::Value;

/// Fields that may be selected by.
const FIELDS: [&str; 4] = [
    "metadata.name",
    "metadata.namespace",
    "spec.nodeName",
    "status.phase",
];

/// Both selectors of a request.
#[derive(Debug, Clone, Default)]
pub struct Selector(Vec<Requirement>);

#[derive(Debug, Clone)]
struct Requirement {
    label: bool,
    key: String,
    /// None: that it is there.
    value: Option<String>,
    negated: bool,
}

impl Selector {
    /// From the parameters `fieldSelector` and `labelSelector`.
    pub fn parse(fields: &str, labels: &str) -> Result<Self, String> {
        let parts = |text: &str, label| {
            let parts = text.split(',').filter(|part| !part.is_empty());
            let parts = parts.map(move |part| (label, part.to_owned()));
            parts.collect::<Vec<_>>()
        };
        let all = parts(fields, false).into_iter().chain(parts(labels, true));
        all.map(|(label, part)| requirement(label, &part))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Whether an object is selected.
    pub fn matches(&self, object: &Value) -> bool {
        self.0.iter().all(|requirement| requirement.holds(object))
    }
}

fn requirement(label: bool, part: &str) -> Result<Requirement, String> {
    let of = |key: &str, value: Option<&str>, negated| Requirement {
        label,
        key: key.to_owned(),
        value: value.map(str::to_owned),
        negated,
    };
    let requirement = if let Some((key, value)) = part.split_once("!=") {
        of(key, Some(value), true)
    } else if let Some((key, value)) = part.split_once('=') {
        of(key, Some(value.trim_start_matches('=')), false)
    } else if let Some(key) = part.strip_prefix('!') {
        of(key, None, true)
    } else {
        of(part, None, false)
    };
    if !label && !FIELDS.contains(&requirement.key.as_str()) {
        return Err(format!("field label not supported: {}", requirement.key));
    }
    Ok(requirement)
}

impl Requirement {
    fn holds(&self, object: &Value) -> bool {
        let found = if self.label {
            object["metadata"]["labels"][&self.key].as_str()
        } else {
            let pointer = format!("/{}", self.key.replace('.', "/"));
            Some(
                object
                    .pointer(&pointer)
                    .and_then(Value::as_str)
                    .unwrap_or(""),
            )
        };
        let holds = match &self.value {
            Some(value) => found == Some(value),
            None => found.is_some(),
        };
        holds != self.negated
    }
}
