//! `$(VAR)`: replaced when VAR is known, left as it is when not; `$$` is one dollar sign.

/// The kernel gives no program a longer argument or variable (MAX_ARG_STRLEN).
pub const MAX_TEXT: usize = 128 << 10;

/// A text that no program can be given. Without a limit, thirty variables that each name the one before twice would take
/// all memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("is longer than {MAX_TEXT} bytes, which is the most that a program can be given")]
pub struct TooLong;

/// Expands every reference in `text`.
///
/// # Errors
/// When the result is too long for any program.
pub fn expand(text: &str, lookup: impl Fn(&str) -> Option<String>) -> Result<String, TooLong> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(dollar) = rest.find('$') {
        out.push_str(&rest[..dollar]);
        rest = &rest[dollar + 1..];
        if out.len() > MAX_TEXT {
            return Err(TooLong);
        }
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
    if out.len() > MAX_TEXT { Err(TooLong) } else { Ok(out) }
}

/// The names that `text` refers to.
pub fn names(text: &str) -> Vec<String> {
    let seen = std::cell::RefCell::new(Vec::new());
    // What is too long is told to whoever expands it.
    drop(expand(text, |name| {
        seen.borrow_mut().push(name.to_owned());
        None
    }));
    seen.into_inner()
}

fn reference(rest: &str) -> Option<(&str, &str)> {
    rest.strip_prefix('(')?.split_once(')')
}
