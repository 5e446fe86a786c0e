// Package crypt holds the keys of encrypted lineages.
//
// # The nouns
//
//   - A data key is 32 random bytes, one for each encrypted lineage. Everything of the lineage is
//     sealed with keys derived from it. It is in memory only.
//   - A wrapped key is a data key encrypted under a key that lazyvol does not keep. The lineage's
//     record holds it. It says what wrapped it, and is bound to the id of its lineage: in the record
//     of another one it unwraps to nothing.
//   - A key URI names the key that wraps: a key file ("file:///etc/lazyvol.key") or a symmetric
//     encryption key of AWS KMS ("awskms:///arn:aws:kms:…").
//   - A key file is 32 random bytes with a random id, as text, readable by its owner alone.
//   - [Keys] draws data keys, and wraps and unwraps them.
//
// Wrapped keys and key files come from outside and are not trusted: their decoders accept any bytes,
// and are bounded. docs/format.md specifies both.
//
// # What stays in memory
//
// Buffers of this package that held a secret are zeroed once they are not needed, and whoever is
// given a data key does the same with clear. That shortens a secret's life; it does not end it for
// certain: the key schedule inside a cipher.AEAD cannot be zeroed, nor can what the AWS SDK and
// net/http read a response of KMS into (it holds the data key as base64), and any goroutine's stack
// may have been copied while it grew. All of it is gone when the process is. What keeps it from
// cores and other processes until then is that the daemon is not dumpable.
package crypt
