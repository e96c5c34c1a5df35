// Command imagewolf-notifier hears of images that are pushed and has nodes
// prefetch them. Everything it does is in package command.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/imagewolf/imagewolf/cmd/imagewolf-notifier/command"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := command.App().RunContext(ctx, os.Args)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "imagewolf-notifier: %v\n", err)
		os.Exit(1)
	}
}
