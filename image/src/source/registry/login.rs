//! Logging in: what a registry asks for (RFC 9110 §11), and the token from where it says that there is one (distribution project,
//! "Token Authentication Specification").

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http_auth::parser::ChallengeParser;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{StatusCode, Url};
use serde::Deserialize;

use super::Connection;
use crate::error::Error;
use crate::source::credentials::Login;

/// The longest answer with a token.
const TOKEN_MAX: u64 = 1 << 20;
/// What is fetched, for errors.
const WHAT: &str = "a login token";

/// Where a registry says that there are tokens.
#[derive(Debug, PartialEq, Eq)]
struct Bearer {
    realm: String,
    service: Option<String>,
}

impl Bearer {
    /// What the headers of a refusal name. What cannot be understood asks for nothing.
    fn of(headers: &HeaderMap) -> Option<Self> {
        let lines = headers.get_all(WWW_AUTHENTICATE).into_iter().filter_map(|line| line.to_str().ok());
        let challenges = lines.flat_map(|line| ChallengeParser::new(line).map_while(Result::ok));
        challenges.filter(|challenge| challenge.scheme.eq_ignore_ascii_case("bearer")).find_map(|challenge| {
            let parameter = |name: &str| {
                let mut all = challenge.params.iter();
                all.find_map(|(key, value)| key.eq_ignore_ascii_case(name).then(|| value.to_unescaped()))
            };
            Some(Self { realm: parameter("realm")?, service: parameter("service") })
        })
    }
}

/// The answer with a token: of the two names, either or both.
#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

impl Connection {
    /// What to send to a registry that has refused a request with these headers: a token for the repository, or the login.
    ///
    /// # Errors
    /// There is no login for what it asks, or the token is not to be had.
    pub(super) async fn log_in(&self, refusal: &HeaderMap) -> Result<HeaderValue, Error> {
        let text = match (Bearer::of(refusal), self.basic()) {
            (Some(bearer), basic) => format!("Bearer {}", self.token(bearer, basic).await?),
            (None, Some(basic)) => basic,
            (None, None) => return Err(self.denied()),
        };
        self.secret(text)
    }

    /// The login as a header has it.
    fn basic(&self) -> Option<String> {
        let Login { user, password } = self.login.as_ref()?;
        Some(format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
    }

    fn secret(&self, text: String) -> Result<HeaderValue, Error> {
        let mut header = HeaderValue::try_from(text).map_err(|error| self.transfer(WHAT, error.into()))?;
        header.set_sensitive(true);
        Ok(header)
    }

    async fn token(&self, bearer: Bearer, basic: Option<String>) -> Result<String, Error> {
        let malformed = |reason: &str| Error::Malformed { what: WHAT.to_owned(), reason: reason.to_owned() };
        let mut url = Url::parse(&bearer.realm).map_err(|_| malformed("the registry names no address for it"))?;
        // A login is not to be read on its way, wherever the registry sends it.
        if basic.is_some() && url.scheme() != "https" && !self.reference.is_loopback() {
            return Err(malformed("the registry wants the login without TLS"));
        }
        url.query_pairs_mut().append_pair("scope", &format!("repository:{}:pull", self.reference.repository()));
        if let Some(service) = bearer.service {
            url.query_pairs_mut().append_pair("service", &service);
        }
        let mut request = self.http.get(url);
        if let Some(basic) = basic {
            request = request.header(AUTHORIZATION, self.secret(basic)?);
        }
        let response = request.send().await.map_err(|error| self.request_error(WHAT, error))?;
        if response.status() != StatusCode::OK {
            return Err(self.denied());
        }
        let bytes = self.document(response, TOKEN_MAX, WHAT).await?;
        // What there is instead may be a secret all the same: it is not told.
        let token: Token =
            serde_json::from_slice(&bytes).map_err(|_| malformed("it is no JSON object with a token"))?;
        token.token.or(token.access_token).ok_or_else(|| malformed("the answer has none"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_for_tokens_is_found_among_other_challenges() {
        let of = |lines: &[&str]| {
            let lines = lines.iter().map(|line| (WWW_AUTHENTICATE, HeaderValue::from_str(line).unwrap()));
            Bearer::of(&lines.collect())
        };
        let bearer = |service: Option<&str>| {
            Some(Bearer { realm: "https://a/t".to_owned(), service: service.map(str::to_owned) })
        };
        assert_eq!(of(&[r#"Bearer realm="https://a/t",service="s",scope="x""#]), bearer(Some("s")));
        assert_eq!(of(&[r#"basic realm="r", BEARER Realm="https://a/t""#]), bearer(None));
        assert_eq!(of(&[r#"Basic realm="r""#, "\u{e4}", r#"Bearer realm="https://a/t""#]), bearer(None));
        assert_eq!(of(&["Basic realm=a b", r#"Bearer realm="https://a/t""#]), bearer(None));
        for nonsense in [&[][..], &["Basic realm=\"r\""], &["Bearer"], &["\"\""], &[",,=,"], &["Bearer realm"]] {
            assert_eq!(of(nonsense), None, "{nonsense:?}");
        }
    }
}
