package main

import (
	"errors"
	"fmt"
	iofs "io/fs"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/crypt"
)

func (a *app) keyCommand() *cobra.Command {
	return group("key", "Make the keys that encrypt, and destroy data keys",
		a.keyGenerateCommand(), a.keyShredCommand(),
	)
}

func (a *app) keyGenerateCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "generate FILE", Short: "Make a key file", Args: args(cobra.ExactArgs(1)),
		Long: `Makes a key file, which must not exist, and prints its URI, for --key. It is a
secret: only its owner may read it, and lazyvol refuses one that others may.

Put it on every host that uses what is encrypted under it, at the same path, and
keep a copy elsewhere, but not in the store: without it nothing of that can be read
again, by anybody.`,
		Example: "  lazyvol key generate /etc/lazyvol.key",
		RunE: func(_ *cobra.Command, args []string) error {
			path := args[0]
			if path == "" || strings.Contains(path, "://") {
				return usageError{fmt.Errorf("%q is not the path of a file", path)}
			}
			uri, id, err := crypt.CreateKeyFile(path)
			if errors.Is(err, iofs.ErrExist) {
				return refusal{fmt.Errorf("%w; it may be the only copy of a key and is left as it is", err)}
			}
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(a.stdout, struct{ KeyUri, KeyId string }{uri, id})
			}
			fmt.Fprintln(a.stdout, uri)
			fmt.Fprintf(a.stderr, "keep a copy of %s: nothing encrypted under it can be read without it\n", path)
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}
