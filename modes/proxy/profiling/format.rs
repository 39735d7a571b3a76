//! The format of profiles, `perftools.profiles.Profile` (profile.proto of pprof): the numbers of its fields are facts of
//! that format. Every text is an index into one table, whose first entry is empty.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use prost::Message;

#[derive(Clone, PartialEq, Message)]
struct Profile {
    #[prost(message, repeated, tag = "1")]
    sample_type: Vec<ValueType>,
    #[prost(message, repeated, tag = "2")]
    sample: Vec<Sample>,
    #[prost(message, repeated, tag = "4")]
    location: Vec<Location>,
    #[prost(message, repeated, tag = "5")]
    function: Vec<Function>,
    #[prost(string, repeated, tag = "6")]
    string_table: Vec<String>,
    #[prost(int64, tag = "9")]
    time_nanos: i64,
    #[prost(int64, tag = "10")]
    duration_nanos: i64,
    #[prost(message, optional, tag = "11")]
    period_type: Option<ValueType>,
    #[prost(int64, tag = "12")]
    period: i64,
}

/// What a value of a sample counts, and its unit.
#[derive(Clone, PartialEq, Message)]
struct ValueType {
    #[prost(int64, tag = "1")]
    kind: i64,
    #[prost(int64, tag = "2")]
    unit: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Sample {
    /// The innermost function first.
    #[prost(uint64, repeated, tag = "1")]
    location_id: Vec<u64>,
    /// In the order of the profile's `sample_type`.
    #[prost(int64, repeated, tag = "2")]
    value: Vec<i64>,
    #[prost(message, repeated, tag = "3")]
    label: Vec<Label>,
}

#[derive(Clone, PartialEq, Message)]
struct Label {
    #[prost(int64, tag = "1")]
    key: i64,
    #[prost(int64, tag = "2")]
    str: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Location {
    #[prost(uint64, tag = "1")]
    id: u64,
    /// The function, after those that were inlined into it.
    #[prost(message, repeated, tag = "4")]
    line: Vec<Line>,
}

#[derive(Clone, PartialEq, Message)]
struct Line {
    #[prost(uint64, tag = "1")]
    function_id: u64,
    #[prost(int64, tag = "2")]
    line: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Function {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(int64, tag = "2")]
    name: i64,
    #[prost(int64, tag = "3")]
    system_name: i64,
    #[prost(int64, tag = "4")]
    filename: i64,
}

/// The function of a sample that has none: what was interrupted is assembler that says nothing about its caller. Readers want
/// at least one.
const UNREADABLE: &str = "[stack cannot be read]";

/// Things that are written once and referred to by their number.
#[derive(Default)]
struct Tables {
    texts: HashMap<String, i64>,
    strings: Vec<String>,
    functions: HashMap<(i64, i64), u64>,
    locations: HashMap<Vec<(u64, u32)>, u64>,
    profile: Profile,
}

impl Tables {
    fn new() -> Self {
        let mut tables = Self::default();
        tables.text("");
        tables
    }

    fn text(&mut self, text: &str) -> i64 {
        if let Some(index) = self.texts.get(text) {
            return *index;
        }
        let index = i64::try_from(self.strings.len()).unwrap_or(i64::MAX);
        self.strings.push(text.to_owned());
        self.texts.insert(text.to_owned(), index);
        index
    }

    fn value_type(&mut self, kind: &str, unit: &str) -> ValueType {
        ValueType {
            kind: self.text(kind),
            unit: self.text(unit),
        }
    }

    fn function(&mut self, name: &str, filename: &str) -> u64 {
        let (name, filename) = (self.text(name), self.text(filename));
        let functions = &mut self.profile.function;
        *self.functions.entry((name, filename)).or_insert_with(|| {
            // Zero means none.
            let id = functions.len() as u64 + 1;
            functions.push(Function {
                id,
                name,
                system_name: name,
                filename,
            });
            id
        })
    }

    fn frame(&mut self, symbols: &[pprof::Symbol]) -> u64 {
        let lines = symbols
            .iter()
            .map(|symbol| {
                let function = self.function(&symbol.name(), &symbol.filename());
                (function, symbol.lineno())
            })
            .collect();
        self.location(lines)
    }

    fn location(&mut self, lines: Vec<(u64, u32)>) -> u64 {
        let locations = &mut self.profile.location;
        *self.locations.entry(lines.clone()).or_insert_with(|| {
            let id = locations.len() as u64 + 1;
            let line = lines.into_iter().map(|(function_id, line)| Line {
                function_id,
                line: i64::from(line),
            });
            locations.push(Location {
                id,
                line: line.collect(),
            });
            id
        })
    }
}

/// A report as a profile of processor time.
pub(super) fn cpu(
    report: &pprof::Report,
    began: SystemTime,
    time: Duration,
    frequency: u32,
) -> Vec<u8> {
    let nanos = |time: Duration| i64::try_from(time.as_nanos()).unwrap_or(i64::MAX);
    let period = nanos(Duration::from_secs(1)) / i64::from(frequency.max(1));
    let mut tables = Tables::new();
    tables.profile.sample_type = vec![
        tables.value_type("samples", "count"),
        tables.value_type("cpu", "nanoseconds"),
    ];
    let thread = tables.text("thread");
    for (stack, count) in &report.data {
        let count = i64::try_from(*count).unwrap_or(i64::MAX);
        let frames = stack.frames.iter();
        let mut location_id: Vec<u64> = frames.map(|symbols| tables.frame(symbols)).collect();
        if location_id.is_empty() {
            let unreadable = tables.function(UNREADABLE, "");
            location_id.push(tables.location(vec![(unreadable, 0)]));
        }
        let sample = Sample {
            location_id,
            value: vec![count, count.saturating_mul(period)],
            label: vec![Label {
                key: thread,
                str: tables.text(&stack.thread_name_or_id()),
            }],
        };
        tables.profile.sample.push(sample);
    }
    tables.profile.period_type = Some(tables.value_type("cpu", "nanoseconds"));
    tables.profile.period = period;
    tables.profile.duration_nanos = nanos(time);
    let since = began.duration_since(SystemTime::UNIX_EPOCH);
    tables.profile.time_nanos = nanos(since.unwrap_or_default());
    tables.profile.string_table = tables.strings;
    tables.profile.encode_to_vec()
}
