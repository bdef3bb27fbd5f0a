use serde_json::json;

use super::*;

#[track_caller]
fn matches(labels: &str, fields: &str) -> bool {
    let pod = json!({
        "metadata": {"name": "web", "namespace": "shop", "labels": {"app": "web", "tier": "3"}},
        "spec": {"nodeName": "n1"}, "status": {"phase": "Running"},
    });
    let selector = Selector::parse(&kinds::POD, labels, fields).unwrap();
    selector.matches(&Object::new(&kinds::POD, 7, &pod))
}

#[test]
fn label_selectors() {
    for yes in [
        "",
        "app=web",
        "app==web,tier",
        "app in (api, web)",
        "app notin (api)",
        "!gone",
        "gone!=x",
        "tier>2",
        "tier<4",
        "gone notin (x)",
    ] {
        assert!(matches(yes, ""), "{yes}");
    }
    for no in ["app=api", "!app", "gone", "app notin (web,x)", "tier>3", "gone in (x)"] {
        assert!(!matches(no, ""), "{no}");
    }
}

#[test]
fn field_selectors() {
    for yes in
        ["spec.nodeName=n1", "metadata.name=web,metadata.namespace==shop", "status.phase!=Failed"]
    {
        assert!(matches("", yes), "{yes}");
    }
    assert!(!matches("", "spec.nodeName="));
    let error = Selector::parse(&kinds::POD, "", "spec.colour=red").unwrap_err();
    assert_eq!(error.message, "field label not supported: spec.colour");
}

#[test]
fn unreadable_selectors_are_refused() {
    for bad in ["a in x", "a in (x", "=x", "a b"] {
        assert_eq!(Selector::parse(&kinds::POD, bad, "").unwrap_err().code, 400, "{bad}");
    }
}
