//! The part of Mermaid's grammar of sequence diagrams that is used, checked line by line.
//!
//! A text ends at `;`, `#` begins an entity, and both ends of an arrow or note have to be participants: Mermaid itself would
//! make one of a slip.

use std::collections::BTreeSet;

/// The texts of a diagram's notes and arrows in order, or what is wrong with it.
pub fn texts(diagram: &str) -> Result<Vec<String>, String> {
    let mut lines = diagram.lines();
    if lines.next() != Some("sequenceDiagram") {
        return Err("it is no sequence diagram".to_owned());
    }
    let mut participants = BTreeSet::new();
    let mut texts = Vec::new();
    for line in lines {
        let wrong = |what: &str| Err(format!("{what}: {line}"));
        let Some(statement) = line.strip_prefix("  ") else {
            return wrong("not indented");
        };
        if let Some(declared) = statement.strip_prefix("participant ") {
            let Some((id, name)) = declared.split_once(" as ") else {
                return wrong("a participant without a name");
            };
            if !texts.is_empty() || !is_id(id) || name.is_empty() || !participants.insert(id) {
                return wrong("a participant out of place");
            }
            is_text(name).map_err(|what| format!("{what}: {line}"))?;
            continue;
        }
        let Some((head, text)) = statement.split_once(": ") else {
            return wrong("no text");
        };
        let ends: Vec<&str> = match head.strip_prefix("Note over ") {
            Some(over) => over.split(',').collect(),
            None => match head.split_once("->>") {
                Some((from, to)) => vec![from, to],
                None => return wrong("neither a note nor an arrow"),
            },
        };
        if ends.len() > 2 || ends.iter().any(|end| !participants.contains(end)) {
            return wrong("no participant");
        }
        is_text(text).map_err(|what| format!("{what}: {line}"))?;
        texts.push(text.to_owned());
    }
    Ok(texts)
}

fn is_id(id: &str) -> bool {
    !id.is_empty() && id != "end" && id.chars().all(|c| c.is_ascii_alphanumeric())
}

fn is_text(text: &str) -> Result<(), &'static str> {
    match text {
        _ if text.trim().is_empty() => Err("an empty text"),
        _ if text.contains(['#', ';']) => Err("a text that ends early"),
        _ if text.chars().any(char::is_control) => Err("a control character"),
        _ if text.starts_with("wrap:") || text.starts_with("nowrap:") => Err("a directive"),
        _ => Ok(()),
    }
}

#[test]
fn slips_are_found() {
    let whole = "sequenceDiagram\n  participant p0 as pod a/b\n  participant p1 as node1\n  p0->>p1: out by eth0: a > b\n  Note over p0,p1: mark 0x100\n";
    assert_eq!(texts(whole).unwrap(), ["out by eth0: a > b", "mark 0x100"]);
    for (from, to) in [
        ("sequenceDiagram", "graph TD"),
        ("p0->>p1", "p0->>p2"),
        ("p0->>p1", "p0-p1"),
        ("over p0,p1", "over p0,p1,p0"),
        ("mark 0x100", "rule #3"),
        ("mark 0x100", "a; b"),
        ("eth0: a > b", "eth0\n b"),
        (": mark 0x100", ""),
        ("participant p1 as node1", "participant p0 as node1"),
    ] {
        let broken = whole.replace(from, to);
        assert!(texts(&broken).is_err(), "{from} → {to}");
    }
}
