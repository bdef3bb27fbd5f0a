//! `$(VAR)`: replaced when VAR is known, left as it is when not; `$$` is one dollar sign.

/// Expands every reference in `text`.
pub fn expand(text: &str, lookup: impl Fn(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(dollar) = rest.find('$') {
        out.push_str(&rest[..dollar]);
        rest = &rest[dollar + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = reference(rest) {
            match lookup(name) {
                Some(value) => out.push_str(&value),
                None => {
                    out.push_str("$(");
                    out.push_str(name);
                    out.push(')');
                }
            }
            rest = after;
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    out
}

/// The names that `text` refers to.
pub fn names(text: &str) -> Vec<String> {
    let seen = std::cell::RefCell::new(Vec::new());
    expand(text, |name| {
        seen.borrow_mut().push(name.to_owned());
        None
    });
    seen.into_inner()
}

fn reference(rest: &str) -> Option<(&str, &str)> {
    rest.strip_prefix('(')?.split_once(')')
}
