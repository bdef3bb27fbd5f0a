//! Resource quantities as Kubernetes writes them: `500m`, `2`, `128Mi`, `1e3`, `10G`.

/// What a quantity must look like, for error texts.
pub const EXPECTED: &str = "a quantity (such as 500m, 2 or 128Mi)";

/// Reads a quantity in thousandths of its unit; fractions below that round up, as Kubernetes does.
pub fn parse_milli(text: &str) -> Option<u128> {
    let digits_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits_end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') || fraction.len() > 18 {
        return None;
    }
    let mantissa: u128 = format!("{whole}{fraction}").parse().ok()?;
    let divisor = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let (multiply, divide) = scale(suffix)?;
    let numerator = mantissa.checked_mul(multiply)?.checked_mul(1000)?;
    Some(numerator.div_ceil(divisor.checked_mul(divide)?))
}

/// Reads a quantity in whole units, rounded up: bytes, pods, pieces.
pub fn parse(text: &str) -> Option<u64> {
    parse_milli(text).and_then(|milli| u64::try_from(milli.div_ceil(1000)).ok())
}

/// What a suffix multiplies and divides by.
fn scale(suffix: &str) -> Option<(u128, u128)> {
    Some(match suffix {
        "" => (1, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1000),
        "k" => (1000, 1),
        "M" => (1_000_000, 1),
        "G" => (1_000_000_000, 1),
        "T" => (1_000_000_000_000, 1),
        "P" => (1_000_000_000_000_000, 1),
        "E" => (1_000_000_000_000_000_000, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        _ => return exponent(suffix),
    })
}

fn exponent(suffix: &str) -> Option<(u128, u128)> {
    let power: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
    let size = 10_u128.checked_pow(power.unsigned_abs())?;
    Some(if power < 0 { (1, size) } else { (size, 1) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_notation() {
        for (text, milli) in [
            ("0", 0),
            ("2", 2000),
            ("500m", 500),
            ("0.5", 500),
            (".5", 500),
            ("1.", 1000),
            ("128Mi", (128 << 20) * 1000),
            ("1e3", 1_000_000),
            ("5E-1", 500),
            ("1E", 1_000_000_000_000_000_000_000),
            ("1n", 1),
            ("10G", 10_000_000_000_000),
        ] {
            assert_eq!(parse_milli(text), Some(milli), "{text}");
        }
        assert_eq!(parse("1500m"), Some(2));
    }

    #[test]
    fn refuses_everything_else() {
        for text in ["", ".", "-1", "1.2.3", "1mi", "Mi", "1 Mi", "1e", "1e99", "ten"] {
            assert_eq!(parse_milli(text), None, "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn never_panics(text in ".{0,24}") {
            parse_milli(&text);
            parse(&text);
        }
    }
}
