package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// filterNames are those that EBS filters snapshots by and that mean something here;
// "tag:" is followed by a key.
var filterNames = []string{
	"description", "encrypted", "owner-id", "progress", "snapshot-id", "start-time", "status", "storage-tier", "tag:", "tag-key", "transfer-type", "volume-id", "volume-size",
}

// filterTime is how EBS writes a time, for start-time.
const filterTime = "2006-01-02T15:04:05.000Z"

// filters are patterns by the name of what they are matched with. A snapshot passes
// that matches one pattern of each name.
type filters map[string][]string

// parseFilters parses name=value pairs.
func parseFilters(pairs []string) (filters, error) {
	f := make(filters)
	for _, pair := range pairs {
		name, value, ok := strings.Cut(pair, "=")
		if !ok {
			return nil, usageError{fmt.Errorf("--filter %q is not NAME=VALUE", pair)}
		}
		known := slices.Contains(filterNames, name) && name != "tag:"
		if key, isTag := strings.CutPrefix(name, "tag:"); isTag {
			known = key != ""
		}
		if !known {
			return nil, usageError{fmt.Errorf("there is no filter %q; there are: %s", name, strings.Replace(strings.Join(filterNames, ", "), "tag:,", "tag:KEY,", 1))}
		}
		f[name] = append(f[name], value)
	}
	return f, nil
}

// pass reports whether a snapshot is to be shown.
func (f filters) pass(s snapshotJSON) bool {
	for name, patterns := range f {
		values := filterValues(s, name)
		if !slices.ContainsFunc(patterns, func(pattern string) bool {
			return slices.ContainsFunc(values, func(value string) bool { return matchWildcards(pattern, value) })
		}) {
			return false
		}
	}
	return true
}

// filterValues returns what a snapshot has of that name: of tag-key any number.
func filterValues(s snapshotJSON, name string) (values []string) {
	switch name {
	case "description":
		return []string{s.Description}
	case "encrypted":
		return []string{strconv.FormatBool(s.Encrypted)}
	case "owner-id":
		return []string{s.OwnerId}
	case "progress":
		return []string{s.Progress}
	case "snapshot-id":
		return []string{s.SnapshotId}
	case "start-time":
		return []string{s.StartTime.UTC().Format(filterTime)}
	case "status":
		return []string{s.State}
	case "storage-tier":
		return []string{s.StorageTier}
	case "transfer-type":
		if s.TransferType == "" {
			return nil
		}
		return []string{s.TransferType}
	case "volume-id":
		return []string{s.VolumeId}
	case "volume-size":
		return []string{strconv.FormatInt(s.VolumeSize, 10)}
	}
	key, byKey := strings.CutPrefix(name, "tag:")
	for _, t := range s.Tags {
		switch {
		case !byKey:
			values = append(values, t.Key)
		case t.Key == key:
			values = append(values, t.Value)
		}
	}
	return values
}

// matchWildcards matches as EC2 does: * is any characters or none, ? one character or
// none, and \ takes the meaning from what follows it. Case matters.
func matchWildcards(pattern, value string) bool {
	const (
		literal = iota
		many
		optional
	)
	text := []rune(value)
	// at[i]: what was seen of the pattern matches the first i characters.
	at := make([]bool, len(text)+1)
	at[0] = true
	runes := []rune(pattern)
	for k := 0; k < len(runes); k++ {
		c, kind := runes[k], literal
		switch {
		case c == '\\' && k+1 < len(runes):
			k++
			c = runes[k]
		case c == '*':
			kind = many
		case c == '?':
			kind = optional
		}
		next := make([]bool, len(at))
		for i := range next {
			switch kind {
			case many:
				next[i] = at[i] || i > 0 && next[i-1]
			case optional:
				next[i] = at[i] || i > 0 && at[i-1]
			default:
				next[i] = i > 0 && at[i-1] && text[i-1] == c
			}
		}
		at = next
	}
	return at[len(text)]
}
