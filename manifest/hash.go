package manifest

import (
	"crypto/sha256"
	"encoding/hex"
)

// A Hash is a SHA-256.
type Hash = [sha256.Size]byte

// Sum is the SHA-256 of data.
func Sum(data []byte) Hash { return sha256.Sum256(data) }

// A HexHash is a [Hash] that is written, in records and messages, as 64 lower-case hex digits.
type HexHash Hash

func (h HexHash) String() string { return hex.EncodeToString(h[:]) }

// MarshalText returns what String does.
func (h HexHash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText is the inverse of MarshalText. Its error wraps [ErrCorrupt].
func (h *HexHash) UnmarshalText(text []byte) error {
	if len(text) != 2*len(h) || !isHex(string(text)) {
		return corrupt("hash", "%d characters that are not %d lower-case hex digits", len(text), 2*len(h))
	}
	_, err := hex.Decode(h[:], text)
	return err
}
