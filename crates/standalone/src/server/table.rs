//! Tables: what `kubectl get` prints. The columns are those of Kubernetes.

mod pod;
mod workload;

use std::sync::Arc;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::kinds::{self, Kind};
use crate::object::Object;

/// A column; those with priority 1 are shown with `-o wide`.
struct Column {
    name: &'static str,
    kind: &'static str,
    priority: u8,
}

const fn text(name: &'static str) -> Column {
    Column { name, kind: "string", priority: 0 }
}

const fn number(name: &'static str) -> Column {
    Column { name, kind: "integer", priority: 0 }
}

const fn wide(name: &'static str) -> Column {
    Column { name, kind: "string", priority: 1 }
}

/// Renders objects as `meta.k8s.io/v1 Table`.
pub(crate) fn render(kind: &Kind, objects: &[Arc<Object>], include: &str, columns: bool) -> Value {
    let now = Timestamp::now();
    let layout = layout(kind);
    // An event's name says nothing; it is shown last, and only with `-o wide`.
    let name_last = *kind == kinds::EVENT;
    let rows: Vec<Value> = objects
        .iter()
        .map(|object| {
            let value = object.value();
            let mut cells = (layout.cells)(&value, now);
            let place = if name_last { cells.len() } else { 0 };
            cells.insert(place, value["metadata"]["name"].clone());
            let mut row = json!({"cells": cells});
            match include {
                "None" => {}
                "Object" => row["object"] = value,
                _ => row["object"] = super::rest::partial(object),
            }
            row
        })
        .collect();
    let definitions: Vec<Value> = if columns { definitions(layout, name_last) } else { Vec::new() };
    let revision = match objects {
        [one] => json!({"resourceVersion": one.revision.to_string()}),
        _ => json!({}),
    };
    json!({
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": revision,
        "columnDefinitions": definitions, "rows": rows,
    })
}

fn definitions(layout: &Layout, name_last: bool) -> Vec<Value> {
    let name = json!({
        "name": "Name", "type": "string", "format": "name", "description": "",
        "priority": u8::from(name_last),
    });
    let mut all: Vec<Value> = layout
        .columns
        .iter()
        .map(|column| {
            json!({
                "name": column.name, "type": column.kind, "format": "", "description": "",
                "priority": column.priority,
            })
        })
        .collect();
    let place = if name_last { all.len() } else { 0 };
    all.insert(place, name);
    all
}

struct Layout {
    /// Without the name, which all have.
    columns: &'static [Column],
    cells: fn(&Value, Timestamp) -> Vec<Value>,
}

fn layout(kind: &Kind) -> &'static Layout {
    const LAYOUTS: &[(&Kind, Layout)] = &[
        (&kinds::POD, Layout { columns: pod::COLUMNS, cells: pod::cells }),
        (&kinds::DEPLOYMENT, Layout { columns: workload::DEPLOYMENT, cells: workload::deployment }),
        (
            &kinds::REPLICA_SET,
            Layout { columns: workload::REPLICA_SET, cells: workload::replica_set },
        ),
        (&kinds::SERVICE, Layout { columns: workload::SERVICE, cells: workload::service }),
        (&kinds::NODE, Layout { columns: workload::NODE, cells: workload::node }),
        (
            &kinds::ENDPOINTS,
            Layout { columns: &[text("Endpoints"), text("Age")], cells: workload::endpoints },
        ),
        (&kinds::ENDPOINT_SLICE, Layout { columns: workload::SLICE, cells: workload::slice }),
        (&kinds::EVENT, Layout { columns: workload::EVENT, cells: workload::event }),
        (
            &kinds::NAMESPACE,
            Layout {
                columns: &[text("Status"), text("Age")],
                cells: |v, now| vec![v["status"]["phase"].clone(), age(v, now)],
            },
        ),
        (
            &kinds::CONFIG_MAP,
            Layout {
                columns: &[number("Data"), text("Age")],
                cells: |v, now| {
                    let count = |field: &str| v[field].as_object().map_or(0, serde_json::Map::len);
                    vec![json!(count("data") + count("binaryData")), age(v, now)]
                },
            },
        ),
        (
            &kinds::SECRET,
            Layout {
                columns: &[text("Type"), number("Data"), text("Age")],
                cells: |v, now| {
                    let count = v["data"].as_object().map_or(0, serde_json::Map::len);
                    vec![v["type"].clone(), json!(count), age(v, now)]
                },
            },
        ),
        (
            &kinds::SERVICE_ACCOUNT,
            Layout {
                columns: &[number("Secrets"), text("Age")],
                cells: |v, now| {
                    let count = v["secrets"].as_array().map_or(0, Vec::len);
                    vec![json!(count), age(v, now)]
                },
            },
        ),
        (
            &kinds::LEASE,
            Layout {
                columns: &[text("Holder"), text("Age")],
                cells: |v, now| vec![v["spec"]["holderIdentity"].clone(), age(v, now)],
            },
        ),
    ];
    const OTHERS: &Layout = &Layout {
        columns: &[text("Created At")],
        cells: |v, _| vec![v["metadata"]["creationTimestamp"].clone()],
    };
    LAYOUTS.iter().find(|(of, _)| *of == kind).map_or(OTHERS, |(_, layout)| layout)
}

/// How old an object is.
fn age(value: &Value, now: Timestamp) -> Value {
    since(&value["metadata"]["creationTimestamp"], now).into()
}

/// The time since a timestamp, as kubectl writes it.
fn since(time: &Value, now: Timestamp) -> String {
    match time.as_str().and_then(|text| text.parse::<Timestamp>().ok()) {
        Some(then) => human(now.as_second() - then.as_second()),
        None => "<unknown>".to_owned(),
    }
}

/// Seconds as Kubernetes' HumanDuration: two units while they matter.
fn human(secs: i64) -> String {
    let (minutes, hours, days) = (secs / 60, secs / 3600, secs / 86_400);
    let two = |big: i64, unit: char, small: i64, small_unit: char| {
        if small == 0 { format!("{big}{unit}") } else { format!("{big}{unit}{small}{small_unit}") }
    };
    match secs {
        i64::MIN..=-2 => "<invalid>".to_owned(),
        -1..=0 => "0s".to_owned(),
        1..=119 => format!("{secs}s"),
        120..=599 => two(minutes, 'm', secs % 60, 's'),
        600..=10_799 => format!("{minutes}m"),
        10_800..=28_799 => two(hours, 'h', minutes % 60, 'm'),
        28_800..=172_799 => format!("{hours}h"),
        172_800..=691_199 => two(days, 'd', hours % 24, 'h'),
        691_200..=63_071_999 => format!("{days}d"),
        63_072_000..=252_287_999 => two(days / 365, 'y', days % 365, 'd'),
        _ => format!("{}y", days / 365),
    }
}

#[cfg(test)]
mod tests;
