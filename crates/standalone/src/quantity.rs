//! Kubernetes quantities: `100m`, `1.5Gi`, `2e3`.

use std::cmp::Ordering;

use serde_json::Value;

/// A quantity in billionths, which is the finest that Kubernetes keeps.
pub(crate) fn nano(text: &str) -> Option<i128> {
    let text = text.trim();
    let (sign, digits) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    let end = digits.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(digits.len());
    let (number, suffix) = digits.split_at(end);
    if number.is_empty() || number == "." || number.matches('.').count() > 1 {
        return None;
    }
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: i128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let mut nanos = whole.checked_mul(1_000_000_000)?;
    for (index, digit) in fraction.bytes().take(9).enumerate() {
        let more = i128::from(digit - b'0') * 10_i128.pow(8 - u32::try_from(index).ok()?);
        nanos = nanos.checked_add(more)?;
    }
    let (up, down) = scale(suffix)?;
    nanos.checked_mul(up).map(|n| sign * n / down)
}

fn scale(suffix: &str) -> Option<(i128, i128)> {
    let binary = |power: u32| Some((1024_i128.pow(power), 1));
    let decimal = |power: u32| Some((10_i128.pow(power), 1));
    match suffix {
        "" => Some((1, 1)),
        "n" => Some((1, 1_000_000_000)),
        "u" => Some((1, 1_000_000)),
        "m" => Some((1, 1000)),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        other => {
            let exponent: i32 = other.strip_prefix(['e', 'E'])?.parse().ok()?;
            let power = 10_i128.checked_pow(exponent.unsigned_abs())?;
            Some(if exponent < 0 { (1, power) } else { (power, 1) })
        }
    }
}

/// Reads a quantity from JSON, where it may be a number.
pub(crate) fn of(value: &Value) -> Option<i128> {
    match value {
        Value::String(text) => nano(text),
        Value::Number(number) => nano(&number.to_string()),
        _ => None,
    }
}

/// Compares two quantities; None when one is none.
pub(crate) fn compare(a: &Value, b: &Value) -> Option<Ordering> {
    Some(of(a)?.cmp(&of(b)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities() {
        let one = 1_000_000_000;
        for (text, want) in [
            ("1", one),
            ("100m", one / 10),
            ("1.5Gi", one * 3 * 512 * 1024 * 1024),
            ("2e3", 2000 * one),
            ("-1k", -1000 * one),
            (".5", one / 2),
            ("5n", 5),
            ("1E", one * 10_i128.pow(18)),
        ] {
            assert_eq!(nano(text), Some(want), "{text}");
        }
        // The second fits until its fraction is added.
        let too_large = ["9".repeat(40), "170141183460469231731687303715.9".to_owned()];
        for large in &too_large {
            assert_eq!(nano(large), None, "{large}");
        }
        for bad in ["", "a", "1x", "1..2", "1 Gi", "."] {
            assert_eq!(nano(bad), None, "{bad}");
        }
    }
}
