//! Writes the description of the API, made from the code, to standard output: `cargo xtask openapi` commits it to a file.

fn main() -> serde_json::Result<()> {
    print!("{}", api::server::document()?);
    Ok(())
}
