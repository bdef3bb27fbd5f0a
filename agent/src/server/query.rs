//! Paths and queries of requests, decoded. Pure.

/// The pairs of a query, in order, with `+` and `%xx` decoded.
pub fn pairs(query: &str) -> Vec<(String, String)> {
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(name, true), decode(value, true))
        })
        .collect()
}

/// The segments of a path, decoded; empty ones are left out.
pub fn segments(path: &str) -> Vec<String> {
    path.split('/').filter(|part| !part.is_empty()).map(|part| decode(part, false)).collect()
}

fn decode(text: &str, plus_is_space: bool) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        match (byte, hex_pair(after)) {
            (b'%', Some((decoded, after))) => {
                bytes.push(decoded);
                rest = after;
            }
            (b'+', _) if plus_is_space => bytes.push(b' '),
            _ => bytes.push(*byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The byte that two digits say, and what follows them.
fn hex_pair(bytes: &[u8]) -> Option<(u8, &[u8])> {
    let ([high, low], rest) = bytes.split_first_chunk()?;
    let digit = |byte: &u8| char::from(*byte).to_digit(16);
    Some((u8::try_from(digit(high)? * 16 + digit(low)?).ok()?, rest))
}

/// The values of a name, in order.
pub fn all<'a>(query: &'a [(String, String)], name: &str) -> Vec<&'a str> {
    let named = query.iter().filter(|(key, _)| key == name);
    named.map(|(_, value)| value.as_str()).collect()
}

/// Whether a flag of the kubelet's API is set.
pub fn is_set(query: &[(String, String)], name: &str) -> bool {
    all(query, name).first().is_some_and(|value| matches!(*value, "1" | "true"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_arrive_as_they_were_typed() {
        let query = pairs("command=sh&command=-c&command=echo+%22a%26b%22%25&input=1&tty");
        assert_eq!(all(&query, "command"), ["sh", "-c", "echo \"a&b\"%"]);
        assert!(is_set(&query, "input") && !is_set(&query, "tty") && !is_set(&query, "output"));
        assert_eq!(segments("/exec/ns//a%2Fb+c/"), ["exec", "ns", "a/b+c"]);
        assert_eq!(decode("%", true) + &decode("%zz%4", false), "%%zz%4");
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_it_panic(text in ".{0,60}") {
            pairs(&text);
            segments(&text);
        }
    }
}
